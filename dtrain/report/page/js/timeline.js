// When each run was started, how it ended, and what went wrong.

const timeline = {
  // The stretches of time in which a run ran: its starts, or SLURM's, where it noted none.
  lives(run, now) {
    const own = run.starts.map((one, i) => {
      const next = run.starts[i + 1];
      const open = !next && run.state === "running";
      const end = one.ended ?? (open ? now : next ? next.at : Math.max(one.at, run.changed));
      return { ...one, end, how: one.why || (open ? "running" : next || run.state === "complete" ? "killed" : run.state) };
    });
    if (own.length) return own;
    return run.incarnations.map((one) => ({ at: one.started, end: one.ended ?? one.started, how: one.code === 0 ? "complete" : one.code === 75 ? "stopped" : "failed", text: one.why, host: one.nodes, job: one.job_id }));
  },

  draw() {
    const open = new Set([...byId("timeline").querySelectorAll("details[open]")].map((node) => node.dataset.run));
    const now = Date.now() / 1000;
    const all = model.runs.map((run) => [run, this.lives(run, now)]);
    const moments = [...all.flatMap(([, lives]) => lives.flatMap((one) => [one.at, one.end])), ...model.runs.flatMap((run) => run.failures.map((one) => one.at))].filter(Number.isFinite);
    const span = [Math.min(...moments), Math.max(...moments)];
    const held = document.activeElement?.closest?.("#timeline details")?.dataset.run;
    const nodes = all.map(([run, lives]) => this.run(run, lives, span, open.has(run.name)));
    const scale = moments.length ? el("p", { class: "scale" }, el("span", {}, moment(span[0])), el("span", {}, moment(span[1]))) : el("p", { class: "hint" }, "No run has noted its starts.");
    byId("timeline").replaceChildren(scale, ...nodes);
    if (held !== undefined) nodes.find((node) => node.dataset.run === held)?.querySelector("summary").focus();
  },

  run(run, lives, [from, to], open) {
    const place = (at) => `${(100 * (at - from)) / (to - from || 1)}%`;
    const track = el("div", { class: "track", "aria-hidden": "true" });
    for (const one of lives) {
      const bar = el("i", { class: one.how });
      bar.style.left = `min(${place(one.at)}, 100% - 4px)`;
      bar.style.width = `${(100 * (one.end - one.at)) / (to - from || 1)}%`;
      track.append(bar);
    }
    for (const one of run.failures) {
      const mark = el("b", {});
      mark.style.left = `min(${place(one.at)}, 100% - 2px)`;
      track.append(mark);
    }
    const times = `${lives.length} start${lives.length === 1 ? "" : "s"}`;
    const failed = run.failures.length ? `; ${run.failures.length} failure${run.failures.length === 1 ? "" : "s"}: ${run.failures.map((one) => one.cause).join(", ")}` : "";
    const damaged = run.damage.length ? `; damaged: ${run.damage.join("; ")}` : "";
    const words = `${lives.length ? `${times}: ${lives.map((one) => one.how).join(", ")}` : "no start is noted"}${failed}${damaged}`;
    return el("details", { class: "life", "data-run": run.name, open },
      el("summary", {}, el("span", { class: "title" }, swatch(run), run.name), track, el("span", { class: "words" }, words)),
      el("ol", {}, ...lives.map((one) => el("li", {}, el("span", { class: `state ${one.how}` }, one.how), ` ${this.words(one)}`))),
      ...run.failures.map((one) => this.failure(one)));
  },

  words(one) {
    const where = [one.host && `on ${one.host}`, one.ranks && `${one.ranks} rank${one.ranks === "1" ? "" : "s"}`, one.gpu || one.device, one.job && `SLURM job ${one.job}`].filter(Boolean).join(", ");
    const from = one.before ? `; went on after epoch ${one.before}` : "";
    const until = one.ended ? ` to ${moment(one.ended)} (${duration(Math.max(0, one.ended - one.at))})` : "";
    const epoch = one.epoch === null || one.epoch === undefined ? "" : `; ended after epoch ${one.epoch}`;
    return `${moment(one.at)}${until}; ${where}${from}${epoch}${one.text ? `; ${one.text}` : ""}`;
  },

  failure(one) {
    const where = [one.rank && `rank ${one.rank}`, one.host && `on ${one.host}`, one.device, one.phase, one.epoch && `epoch ${one.epoch}`, one.step && `step ${one.step}`].filter(Boolean).join(", ");
    const what = [one.type, one.message].filter(Boolean).join(": ");
    return el("div", { class: "failure" }, el("p", {}, el("span", { class: "state failed" }, one.cause || "failure"), ` ${moment(one.at)}; ${where} (${one.file})`),
      what ? el("pre", { tabindex: 0, role: "region", "aria-label": "what was raised" }, what) : null,
      one.traceback && one.traceback !== what ? el("pre", { tabindex: 0, role: "region", "aria-label": "traceback" }, one.traceback) : null,
      one.others ? el("p", { class: "hint" }, `The other ranks: ${one.others}`) : null);
  },
};
