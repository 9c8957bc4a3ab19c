// The table of runs: sorted by a click on a column's name, filtered by words.

const table = {
  metric: null,
  sort: null, // [column, 1 or -1]; null as the runs come

  columns() {
    const metric = this.metric;
    const low = this.common();
    const time = this.time();
    const at = (run, row) => (row >= 0 && run.has(metric) ? run.cells[metric][row] : "");
    const value = (run, row) => ({ text: rounded(at(run, row)), title: at(run, row), key: numberOf(at(run, row)) });
    const ofEpoch = (run, row) => {
      const found = value(run, row);
      return found.title ? { ...found, text: `${found.text} (${run.epochs[row]})` } : found;
    };
    const plain = (text, key = text) => ({ text: text === null || text === undefined || text === "" ? "–" : String(text), key });
    return [
      ["Run", (run) => plain(run.name)],
      ["State", (run) => ({ ...plain(run.state), state: run.state, title: run.damage.join("; ") })],
      ["Epochs", (run) => plain(run.planned === null ? run.epoch || "" : `${run.epoch}/${run.planned}`, run.epoch)],
      ["Best", (run) => ofEpoch(run, run.best(metric))],
      ["Final", (run) => value(run, run.epochs.length - 1)],
      [low === null ? "Same epoch" : `At epoch ${low}`, (run) => value(run, low === null ? -1 : run.epochs.indexOf(low))],
      [time === null ? "Same time" : `After ${duration(time)}`, (run) => ofEpoch(run, time === null || !run.seconds ? -1 : run.seconds.findLastIndex((s) => s <= time))],
      ["Training", (run) => { const s = run.seconds && run.seconds.length ? run.seconds[run.seconds.length - 1] : null; return plain(s === null ? "" : duration(s), s); }],
      ["Samples/s", (run) => { const m = median(run.numbers("samples_per_second")); return plain(m === null ? "" : rounded(String(m), 4), m); }],
      ["Starts", (run) => plain(run.starts.length || "", run.starts.length)],
      ["Ranks", (run) => plain(last(run).ranks, Number(last(run).ranks))],
      ["Device", (run) => plain(last(run).gpu || last(run).device)],
      ["Began", (run) => plain(run.starts.length ? moment(run.starts[0].at) : "", run.starts.length ? run.starts[0].at : null)],
    ];
  },

  // The last epoch, and the training time, that all runs with rows have.
  common() {
    const all = model.runs.filter((run) => run.epochs.length);
    const shared = all.length ? all[0].epochs.filter((epoch) => all.every((run) => run.epochs.includes(epoch))) : [];
    return shared.length ? Math.max(...shared) : null;
  },

  time() {
    const all = model.runs.filter((run) => run.epochs.length);
    return all.length && all.every((run) => run.seconds) ? Math.min(...all.map((run) => run.seconds[run.seconds.length - 1])) : null;
  },

  sorted(rows) {
    if (!this.sort) return rows;
    const [column, way] = this.sort;
    const of = this.columns()[column][1];
    const keyed = rows.map((run) => [of(run).key, run]);
    const missing = (key) => key === null || key === undefined || key === "" || Number.isNaN(key);
    const order = ([a], [b]) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      return way * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
    };
    return keyed.sort(order).map(([, run]) => run);
  },

  draw() {
    this.options();
    const columns = this.columns();
    this.head(columns);
    const rows = this.sorted(model.many() ? model.runs : model.found(Infinity));
    byId("runs").tBodies[0].replaceChildren(...rows.map((run) => el("tr", { "data-run": run.name }, ...columns.map(([, of], i) => {
      const { text, title, state } = of(run);
      if (i === 0) return el("th", { scope: "row" }, swatch(run), text);
      return el("td", { class: state ? `state ${state}` : "number", title: title && title !== text ? title : null }, text);
    }))));
    byId("count").textContent = rows.length === model.all.length ? `${rows.length} runs` : `${rows.length} of ${model.all.length} runs`;
    byId("many").textContent = model.many() ? `This page shows ${MOST_RUNS} runs at a time, those first that changed last; the filter finds others.` : "";
    const mode = model.runs.map((run) => run.modes[this.metric]).find(Boolean);
    byId("runs-hint").textContent = this.metric === null ? "" : `${this.metric}, ${mode === "max" ? "highest" : "lowest"} is best; (n): of epoch n. Training: the sum of the epochs' seconds. Samples/s: of the median epoch.`;
  },

  // The names of the columns are made once; later only what they say changes, so that the focus stays.
  head(columns) {
    const head = byId("runs").tHead;
    if (!head.rows.length) {
      head.append(el("tr", {}, ...columns.map((_, i) => el("th", { scope: "col" }, el("button", { type: "button", onclick: () => this.by(i) })))));
    }
    [...head.rows[0].cells].forEach((cell, i) => {
      const way = this.sort && this.sort[0] === i ? this.sort[1] : 0;
      cell.setAttribute("aria-sort", way > 0 ? "ascending" : way < 0 ? "descending" : "none");
      cell.firstChild.textContent = columns[i][0] + (way > 0 ? " ▲" : way < 0 ? " ▼" : "");
    });
  },

  by(column) {
    const way = this.sort && this.sort[0] === column ? this.sort[1] : 0;
    this.sort = way === 0 ? [column, 1] : way > 0 ? [column, -1] : null;
    this.draw();
  },

  options() {
    const names = [...new Set(model.runs.flatMap((run) => run.columns))].filter((name) => name !== "epoch");
    if (this.metric === null || !names.includes(this.metric)) this.metric = model.runs.map((run) => run.monitor).find(Boolean) || null;
    const select = byId("metric");
    if (JSON.stringify(names) !== select.dataset.names) {
      select.dataset.names = JSON.stringify(names);
      select.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    }
    select.value = this.metric || "";
  },

  // `found`: other runs are drawn; `changed`: other lines are.
  start(changed, found) {
    byId("filter").addEventListener("input", (event) => {
      model.choose(event.target.value);
      if (model.many()) found();
      else this.draw();
    });
    byId("metric").addEventListener("change", (event) => {
      this.metric = event.target.value;
      this.draw();
    });
    byId("only-these").addEventListener("click", () => {
      const shown = new Set(model.found(Infinity).map((run) => run.name));
      model.hidden = new Set(model.runs.map((run) => run.name).filter((name) => !shown.has(name)));
      changed();
    });
  },
};

// What is known of a run's last start.
function last(run) {
  return run.starts.length ? run.starts[run.starts.length - 1] : {};
}

Run.prototype.searched = function searched() {
  this.text ||= [this.name, this.folder, this.state, ...this.starts.flatMap((one) => [one.host, one.gpu, one.device]), ...Object.entries(this.config).map(([key, value]) => `${key}=${value}`)].join("\n").toLowerCase();
  return this.text;
};
