// The curves: a panel for each metric, over one x axis that all of them share.

const MOST_TOLD = 8; // runs in a tip
const CROSS = 4;

// Brings lines with x values of their own onto one axis; `undefined` is "nothing here", null a gap.
function aligned(lines, log) {
  const xs = [...new Set(lines.flatMap((line) => line.xs))].sort((a, b) => a - b);
  const at = new Map(xs.map((x, i) => [x, i]));
  const drawable = (y) => y !== null && Number.isFinite(y) && (!log || y > 0);
  return [xs, ...lines.map((line) => {
    const ys = new Array(xs.length).fill(undefined);
    line.ys.forEach((y, row) => { ys[at.get(line.xs[row])] = drawable(y) ? y : null; });
    return ys;
  })];
}

// The index of the x nearest to one; -1 where there is none.
function nearest(xs, x) {
  let low = 0;
  let high = xs.length - 1;
  while (low < high) {
    const mid = (low + high) >> 1;
    if (xs[mid] < x) low = mid + 1;
    else high = mid;
  }
  return low > 0 && Math.abs(xs[low - 1] - x) <= Math.abs(xs[low] - x) ? low - 1 : high;
}

class Panel {
  constructor(base, charts) {
    this.base = base;
    this.charts = charts;
    this.lines = [];
    this.plot = el("div", { class: "plot", tabindex: 0, role: "group" });
    this.tip = el("div", { class: "tip", hidden: true });
    this.said = el("p", { class: "said" });
    this.node = el("figure", { class: "chart", "data-panel": base }, el("figcaption", {}, base), this.plot, this.tip, this.said);
    this.plot.addEventListener("keydown", (event) => this.key(event));
    this.plot.addEventListener("blur", () => this.leave());
    this.plot.addEventListener("mousedown", (event) => this.grab(event), true);
    new ResizeObserver(() => this.resize()).observe(this.plot);
  }

  resize() {
    const width = this.plot.clientWidth;
    if (this.u && width && width !== this.u.width) this.u.setSize({ width, height: this.plot.clientHeight });
  }

  // Draws anew; where only values have changed, what is there goes on.
  draw() {
    this.lines = model.lines(this.base);
    const looks = this.lines.map((line) => [line.run.name, line.run.place, line.column]);
    const signature = JSON.stringify([looks, model.x, model.log, theme.now()]);
    const data = aligned(this.lines, model.log);
    const [min, max] = model.range || model.extent();
    if (signature === this.signature) {
      this.u.batch(() => {
        this.u.setData(data, false);
        this.u.setScale("x", { min, max });
      });
    } else {
      this.signature = signature;
      if (this.u) this.u.destroy();
      this.u = new uPlot(this.options(min, max), data, this.plot);
    }
    this.describe();
  }

  zoom() {
    const [min, max] = model.range || model.extent();
    this.u.setScale("x", { min, max });
  }

  options(min, max) {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = {
      stroke: colour("--quiet"), grid: { stroke: colour("--grid"), width: 1 }, ticks: { stroke: colour("--grid"), width: 1 },
      font: "12px system-ui, sans-serif", values: (u, splits) => splits.map(tick),
    };
    return {
      width: this.plot.clientWidth || 400, height: this.plot.clientHeight || 250, legend: { show: false },
      scales: { x: { time: false, min, max }, y: { distr: model.log ? 3 : 1 } },
      axes: [{ ...axis, space: 60, incrs: model.x === "epoch" ? [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1e3, 2e3, 5e3, 1e4, 1e5, 1e6] : undefined }, { ...axis, size: 64 }],
      cursor: {
        y: false, drag: { x: true, y: false, setScale: false }, focus: { prox: 24 },
        bind: { dblclick: () => () => { this.charts.range(null); return null; } },
      },
      series: [{}, ...this.lines.map((line) => this.series(line))],
      hooks: {
        setCursor: [() => this.point()],
        setSelect: [(u) => this.select(u)],
        draw: [(u) => this.marks(u)],
      },
    };
  }

  series(line) {
    const train = line.split === "train";
    const few = !train && line.xs.length <= 40;
    return {
      stroke: line.run.colour(), width: train ? 1.2 : 2, dash: train ? [5, 4] : line.run.dash(), alpha: train ? 0.75 : 1,
      points: { show: true, size: train ? 4 : 5, filter: (u, series) => (few ? null : lonely(u.data[series])) },
    };
  }

  select(u) {
    if (u.select.width < 3) return;
    const range = [u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")];
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.charts.range(range);
  }

  // With Shift, a drag moves the axis.
  grab(event) {
    if (!event.shiftKey || event.button !== 0) return;
    event.preventDefault();
    event.stopPropagation();
    const [low, high] = model.range || model.extent();
    const scale = (high - low) / (this.u.over.clientWidth || 1);
    const move = (now) => {
      const by = (event.clientX - now.clientX) * scale;
      this.charts.range([low + by, high + by]);
    };
    const drop = () => {
      removeEventListener("mousemove", move);
      removeEventListener("mouseup", drop);
    };
    addEventListener("mousemove", move);
    addEventListener("mouseup", drop);
  }

  // Circles at the best epochs, triangles where a run was started again, crosses for values that are no finite numbers.
  marks(u) {
    const { ctx, bbox } = u;
    const ratio = devicePixelRatio || 1;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left - 8 * ratio, bbox.top - 8 * ratio, bbox.width + 16 * ratio, bbox.height + 16 * ratio);
    ctx.clip();
    ctx.lineWidth = 2 * ratio;
    for (const line of this.lines) {
      const at = (row) => u.valToPos(line.xs[row], "x", true);
      ctx.strokeStyle = ctx.fillStyle = line.run.colour();
      if (line.column === line.run.monitor && line.run.best(line.column) >= 0) {
        const row = line.run.best(line.column);
        if (!model.log || line.ys[row] > 0) ring(ctx, at(row), u.valToPos(line.ys[row], "y", true), 6 * ratio);
      }
      line.ys.forEach((y, row) => {
        if (y !== null && !Number.isFinite(y)) cross(ctx, at(row), bbox.top + (CROSS + 1) * ratio, CROSS * ratio);
      });
      for (const epoch of line.run.resumed) {
        const row = line.run.epochs.lastIndexOf(epoch);
        if (row >= 0) triangle(ctx, at(row), bbox.top + bbox.height, 5 * ratio);
      }
    }
    ctx.restore();
  }

  // What a pointer or the keyboard is at: the values of the runs there, as the histories have them.
  point() {
    const { left, idx } = this.u.cursor;
    if (idx === null || idx === undefined || left < 0 || !this.lines.length) {
      this.tip.hidden = true;
      return;
    }
    const told = this.told(this.u.data[0][idx]);
    this.tip.replaceChildren(told.head, told.table);
    this.tip.hidden = false;
    this.placeTip(left + this.u.over.offsetLeft);
    this.words = told.words;
  }

  // Under the curve, so that it hides nothing of it; above it where the window ends; else beside the pointer.
  placeTip(x) {
    const box = this.plot.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.tip;
    let left = x - width / 2;
    let top = this.plot.offsetTop + this.plot.offsetHeight;
    if (box.bottom + height > innerHeight) {
      if (box.top - height > 0) top = this.plot.offsetTop - height;
      else {
        top = this.plot.offsetTop;
        left = x + 14 + width > box.width ? x - width - 14 : x + 14;
      }
    }
    this.tip.style.left = `${Math.max(0, Math.min(box.width - width, left))}px`;
    this.tip.style.top = `${top}px`;
  }

  told(x) {
    const runs = [...new Set(this.lines.map((line) => line.run))];
    const y = this.u.cursor.top >= 0 ? this.u.posToVal(this.u.cursor.top, "y") : NaN;
    const found = [];
    for (const run of runs) {
      const xs = model.xs(run);
      const row = xs.length ? nearest(xs, x) : -1;
      if (row < 0 || (model.x === "epoch" && xs[row] !== x)) continue;
      const own = this.lines.filter((line) => line.run === run);
      const gaps = own.map((line) => Math.abs(line.ys[row] - y)).filter(Number.isFinite);
      found.push({ run, row, own, gap: Math.min(...gaps, Infinity) });
    }
    found.sort((a, b) => (a.gap === b.gap ? 0 : a.gap - b.gap));
    const near = found.slice(0, MOST_TOLD);
    const columns = [...new Set(this.lines.map((line) => line.column))];
    const cell = (one, column) => (one.own.some((line) => line.column === column) ? one.run.cells[column][one.row] || "–" : "");
    const table = el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, ""), ...columns.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, ...near.map((one, i) => el("tr", { class: i === 0 && found.length > 1 ? "near" : null, "data-run": one.run.name },
        el("th", { scope: "row" }, swatch(one.run), one.run.name), ...columns.map((name) => el("td", { "data-column": name }, cell(one, name)))))));
    const more = found.length > near.length ? `, and ${found.length - near.length} more runs` : "";
    const where = model.x === "epoch" ? `epoch ${x}` : `${duration(x)} of training, epoch ${[...new Set(near.map((one) => one.run.epochs[one.row]))].join(", ")}`;
    const spoken = near.map((one) => `${one.run.name}: ${columns.map((name) => `${name} ${cell(one, name)}`).join(", ")}`);
    return { head: el("div", {}, where + more), table, words: `${where}. ${spoken.join("; ")}${more}` };
  }

  leave() {
    this.u.setCursor({ left: -10, top: -10 });
    this.tip.hidden = true;
  }

  key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const act = { "+": () => this.charts.scale(0.5), "=": () => this.charts.scale(0.5), "-": () => this.charts.scale(2), 0: () => this.charts.range(null), Escape: () => this.leave() }[event.key];
    if (step && event.shiftKey) this.charts.pan(step * 0.25);
    else if (step) this.step(step);
    else if (event.key === "Home" || event.key === "End") this.step(event.key === "Home" ? -Infinity : Infinity);
    else if (act && !event.ctrlKey && !event.metaKey) act();
    else return;
    event.preventDefault();
  }

  // To the next x, from where the pointer is.
  step(by) {
    const xs = this.u.data[0];
    if (!xs.length) return;
    const [min, max] = model.range || model.extent();
    const first = xs.findIndex((x) => x >= min);
    const last = xs.findLastIndex((x) => x <= max);
    const from = this.tip.hidden ? (by > 0 ? first - 1 : last + 1) : this.u.cursor.idx;
    const index = Math.max(first, Math.min(last, from + by));
    this.u.setCursor({ left: this.u.valToPos(xs[index], "x"), top: this.u.over.clientHeight / 2 });
    byId("spoken").textContent = this.words || "";
  }

  // Words for those who do not see the curve, and what the curve cannot show.
  describe() {
    const runs = new Set(this.lines.map((line) => line.run));
    this.plot.setAttribute("aria-label", `${this.base} over ${model.x === "epoch" ? "epochs" : "training time"}: ${this.lines.length} lines of ${runs.size} runs. Arrow keys read values.`);
    const odd = this.lines.map((line) => [line, line.ys.filter((y) => y !== null && !Number.isFinite(y)).length]).filter(([, n]) => n);
    const low = model.log ? this.lines.reduce((n, line) => n + line.ys.filter((y) => y !== null && y <= 0).length, 0) : 0;
    const words = odd.slice(0, 3).map(([line, n]) => `${line.run.name}: ${line.column} is NaN or infinite in ${n} epoch${n === 1 ? "" : "s"}`);
    if (odd.length > 3) words.push(`and ${odd.length - 3} more lines`);
    if (low) words.push(`${low} values that are not above 0 have no place on a log scale`);
    if (!this.lines.length) words.push("no line is switched on");
    this.said.textContent = words.join("; ");
  }
}

// The rows that have no neighbour to draw a line to.
function lonely(ys) {
  const there = ys.map((y, i) => (y === undefined ? -1 : i)).filter((i) => i >= 0);
  const is = (k) => k >= 0 && k < there.length && ys[there[k]] !== null;
  return there.filter((_, k) => is(k) && !is(k - 1) && !is(k + 1));
}

function ring(ctx, x, y, size) {
  ctx.beginPath();
  ctx.arc(x, y, size, 0, 2 * Math.PI);
  ctx.stroke();
}

function cross(ctx, x, y, size) {
  ctx.beginPath();
  ctx.moveTo(x - size, y - size);
  ctx.lineTo(x + size, y + size);
  ctx.moveTo(x - size, y + size);
  ctx.lineTo(x + size, y - size);
  ctx.stroke();
}

function triangle(ctx, x, y, size) {
  ctx.beginPath();
  ctx.moveTo(x, y - 2 * size);
  ctx.lineTo(x + size, y);
  ctx.lineTo(x - size, y);
  ctx.fill();
}

const charts = {
  panels: new Map(),

  draw() {
    const wanted = model.panels().filter((base) => model.shown.has(base));
    for (const base of wanted) if (!this.panels.has(base)) this.panels.set(base, new Panel(base, this));
    const nodes = wanted.map((base) => this.panels.get(base).node);
    const there = [...byId("charts").children];
    if (nodes.length !== there.length || nodes.some((node, i) => node !== there[i])) byId("charts").replaceChildren(...nodes);
    wanted.forEach((base) => this.panels.get(base).draw());
    this.now = wanted.map((base) => this.panels.get(base));
    if (!wanted.length) byId("charts").replaceChildren(el("p", { class: "hint" }, model.panels().length ? "No metric is switched on." : "There are no rows yet."));
  },

  range(range) {
    const [low, high] = model.extent();
    const least = (high - low) / 1e6;
    model.range = range && range[1] - range[0] > least ? range : range ? model.range : null;
    (this.now || []).forEach((panel) => panel.zoom());
  },

  scale(factor) {
    const [low, high] = model.range || model.extent();
    const mid = (low + high) / 2;
    const half = ((high - low) / 2) * factor;
    const [least, most] = model.extent();
    this.range(mid - half <= least && mid + half >= most ? null : [mid - half, mid + half]);
  },

  pan(share) {
    const [low, high] = model.range || model.extent();
    const by = (high - low) * share;
    this.range([low + by, high + by]);
  },
};
