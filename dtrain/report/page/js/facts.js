// Config and environment: tables of keys by runs.

function matrix(keys, of, shown) {
  const rows = keys.map((key) => [key, model.runs.map((run) => of(run, key))]);
  // `undefined`: nothing at all is known of that run; null: it has no such key.
  const differs = (values) => new Set(values.filter((value) => value !== undefined).map((value) => value ?? "")).size > 1;
  const kept = rows.filter(([, values]) => !shown || differs(values));
  const head = el("thead", {}, el("tr", {}, el("td", {}), ...model.runs.map((run) => el("th", { scope: "col" }, swatch(run), run.name))));
  const body = el("tbody", {}, ...kept.map(([key, values]) => el("tr", { "data-key": key },
    el("th", { scope: "row", class: differs(values) && !shown ? "differs" : null, title: differs(values) ? "differs between the runs" : null }, key),
    ...values.map((value) => el("td", {}, value ?? "–")))));
  return kept.length ? el("table", { class: "matrix" }, head, body) : null;
}

const facts = {
  config() {
    const all = byId("all-keys").checked || model.runs.length === 1;
    const keys = [...new Set(model.runs.flatMap((run) => Object.keys(run.config)))].filter((key) => all || key !== "run.name");
    const found = matrix(keys, (run, key) => (Object.keys(run.config).length ? run.config[key] ?? null : undefined), !all);
    byId("config").replaceChildren(found || el("p", { class: "hint" }, keys.length ? "The runs' configs do not differ." : "There is no config."));
  },

  environment() {
    const keys = [["host", "host"], ["ranks", "ranks"], ["device", "device"], ["gpu", "GPU"], ["cores", "cores"], ["code", "code (commit)"], ["job", "SLURM job"]];
    const versions = [...new Set(model.runs.flatMap((run) => Object.keys(last(run).versions || {})))];
    const names = [...keys.map(([, name]) => name), ...versions];
    const of = (run, name) => {
      if (!run.starts.length) return undefined;
      const one = last(run);
      const key = keys.find(([, shown]) => shown === name);
      return (key ? one[key[0]] : (one.versions || {})[name]) ?? null;
    };
    const known = names.filter((name) => model.runs.some((run) => of(run, name)));
    byId("environment").replaceChildren(matrix(known, of, false) || el("p", { class: "hint" }, "No run has noted its starts."));
  },

  draw() {
    this.config();
    this.environment();
  },
};
