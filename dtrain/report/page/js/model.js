// What is shown: the runs, and what a person chose to see of them.

const NO_METRICS = ["epoch", "lr", "seconds", "samples_per_second"];
const COLOURS = {
  light: ["#0072b2", "#d55e00", "#008a64", "#b8578f", "#a87000", "#3a8fc4", "#4d4d4d"],
  dark: ["#3d9bdc", "#f0803c", "#2bbf92", "#dd94bd", "#e6a93a", "#8accf2", "#e8e27a"],
};
const MOST_RUNS = 100; // drawn at a time: more lines cannot be told apart, and would take minutes
const DASHES = [[], [2, 3], [9, 3, 2, 3]]; // of the first runs, and of those whose colours come again

class Run {
  constructor(data, place) {
    Object.assign(this, data);
    this.source = data;
    this.place = place; // its colour
    this.parsed = new Map();
  }

  numbers(column) {
    if (!this.parsed.has(column)) this.parsed.set(column, (this.has(column) ? this.cells[column] : []).map(numberOf));
    return this.parsed.get(column);
  }

  has(column) {
    return Object.hasOwn(this.cells, column);
  }

  colour() {
    return COLOURS[theme.now()][this.place % COLOURS.light.length];
  }

  dash() {
    return DASHES[Math.floor(this.place / COLOURS.light.length) % DASHES.length];
  }

  // The first row with the best finite value, or -1.
  best(column) {
    const sign = this.modes[column] === "max" ? -1 : 1;
    let found = -1;
    this.numbers(column).forEach((value, row, all) => {
      if (value !== null && Number.isFinite(value) && (found < 0 || sign * value < sign * all[found])) found = row;
    });
    return found;
  }
}

const model = {
  all: [],
  runs: [], // those that are drawn: all, or of very many the first ones that the filter finds
  words: "",
  hidden: new Set(), // names of runs
  shown: new Set(), // panels
  splits: new Set(["train", "valid"]),
  x: "epoch",
  log: false,
  range: null, // of the x axis; null for all
  places: new Map(), // a run's name to its colour, which it keeps while others come

  take(data) {
    for (const run of data.runs) if (!this.places.has(run.name)) this.places.set(run.name, this.places.size);
    const before = new Map(this.all.map((run) => [run.name, run]));
    this.all = data.runs.map((run) => {
      const old = before.get(run.name);
      return old && old.source === run ? old : new Run(run, this.places.get(run.name));
    });
    this.choose(this.words);
  },

  // Of very many runs, those that the filter finds are drawn.
  choose(words) {
    this.words = words;
    const known = new Set(this.panels());
    this.runs = this.many() ? this.found(MOST_RUNS) : this.all;
    const fresh = this.panels().filter((base) => !known.has(base));
    const metrics = fresh.filter((base) => !NO_METRICS.includes(base)).slice(0, 8);
    [...metrics, ...fresh.filter((base) => base === "samples_per_second")].forEach((base) => this.shown.add(base));
  },

  many() {
    return this.all.length > MOST_RUNS;
  },

  // The first runs that the words of the filter are in.
  found(most) {
    const words = this.words.toLowerCase().split(/\s+/).filter(Boolean);
    const found = [];
    for (const run of this.all) {
      if (found.length === most) break;
      if (words.every((word) => run.searched().includes(word))) found.push(run);
    }
    return found;
  },

  // What the columns are called without their split, metrics first.
  panels() {
    const columns = [...new Set(this.runs.flatMap((run) => run.columns))].filter((name) => name !== "epoch");
    const bases = columns.map((name) => (NO_METRICS.includes(name) ? name : name.replace(/^val_/, "")));
    return [...new Set([...bases.filter((name) => !NO_METRICS.includes(name)), ...bases])];
  },

  visible() {
    return this.runs.filter((run) => !this.hidden.has(run.name));
  },

  // The lines of a panel: a run's column each.
  lines(base) {
    const columns = NO_METRICS.includes(base) ? [[base, ""]] : [[base, "train"], [`val_${base}`, "valid"]];
    return this.visible().flatMap((run) =>
      columns
        .filter(([column, split]) => run.has(column) && (!split || this.splits.has(split)))
        .map(([column, split]) => ({ run, column, split, xs: this.xs(run), ys: run.numbers(column) })),
    );
  },

  xs(run) {
    return this.x === "time" && run.seconds ? run.seconds : run.epochs;
  },

  // From the first to the last x of all visible runs.
  extent() {
    const all = this.visible().map((run) => this.xs(run)).filter((xs) => xs.length);
    if (!all.length) return [0, 1];
    const low = Math.min(...all.map((xs) => xs[0]));
    const high = Math.max(...all.map((xs) => xs[xs.length - 1]));
    return high > low ? [low, high] : [low - 0.5, high + 0.5];
  },
};

const theme = {
  now() {
    return document.documentElement.dataset.theme === "dark" ? "dark" : "light";
  },

  start(changed) {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const set = (name) => {
      document.documentElement.dataset.theme = name;
      byId("theme").textContent = name === "dark" ? "Light theme" : "Dark theme";
    };
    set(dark.matches ? "dark" : "light");
    dark.addEventListener("change", () => {
      set(dark.matches ? "dark" : "light");
      changed();
    });
    byId("theme").addEventListener("click", () => {
      set(this.now() === "dark" ? "light" : "dark");
      changed();
    });
  },
};
