// A served page asks for what is new, once a second; an unchanged answer is a word, not the runs again.

const live = {
  tag: null,
  known: new Map(), // runs by their names, as they came last

  start(update, data) {
    this.take(data);
    const ask = async () => {
      if (!document.hidden) await this.ask(update);
      setTimeout(ask, 1000);
    };
    setTimeout(ask, 1000);
  },

  async ask(update) {
    try {
      const headers = this.tag ? { "If-None-Match": `"${this.tag}"` } : {};
      const answer = await fetch(`data.json?since=${this.tag || ""}`, { cache: "no-store", headers });
      if (answer.status === 200) update(this.take(await answer.json()));
      else if (answer.status === 403) return this.say("the server was started anew: open the address that it printed");
      else if (answer.status !== 304) throw new Error(String(answer.status));
      this.say(`live; looked at ${moment(Date.now() / 1000).slice(11)}`);
    } catch {
      this.say("the server does not answer; trying again");
    }
  },

  // Of a run that has not changed there is only the name.
  take(data) {
    const runs = data.runs.map((run) => (typeof run === "string" ? this.known.get(run) : run));
    const whole = runs.every((run) => run !== undefined);
    this.tag = whole ? data.tag : null; // else all of them are asked for the next time
    if (whole) this.known = new Map(runs.map((run) => [run.name, run]));
    return { ...data, runs: runs.filter((run) => run !== undefined) };
  },

  // The time is for the eye alone: a reader of the screen is told when the words change.
  say(words) {
    const [plain, time] = words.split("; looked at ");
    const spot = byId("live");
    if (spot.firstChild?.textContent !== plain) spot.replaceChildren(el("span", {}, plain), el("span", { "aria-hidden": "true", class: "time" }));
    spot.lastChild.textContent = time ? `, ${time}` : "";
  },
};
