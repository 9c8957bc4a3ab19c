// The switches above the curves: runs, metrics, and kinds of line. Each is a button, so that the keyboard has it, too.

function swatch(run) {
  const line = drawn("line", { x1: 1, x2: 21, y1: 6, y2: 6, stroke: run.colour(), "stroke-width": 3, "stroke-dasharray": run.dash().join(" ") || null });
  return drawn("svg", { class: "swatch", width: 22, height: 12, "aria-hidden": "true" }, line);
}

function chip(words, pressed, toggle, { sample = null, title = null, only = null } = {}) {
  const act = (event) => (only && (event.shiftKey || event.altKey) ? only() : toggle());
  return el("button", { type: "button", "aria-pressed": pressed ? "true" : "false", title, "data-name": words, onclick: act },
    sample, el("span", { class: "name" }, words));
}

// Puts new chips where old ones are; the one that has the focus keeps it.
function replaceChips(id, chips) {
  const box = byId(id);
  const held = box.contains(document.activeElement) ? document.activeElement.dataset.name : null;
  const top = box.scrollTop;
  box.replaceChildren(...chips);
  box.scrollTop = top;
  if (held !== null) chips.find((one) => one.dataset.name === held)?.focus();
}

function switchIn(set, name) {
  if (set.has(name)) set.delete(name);
  else set.add(name);
}

const legend = {
  draw(changed) {
    const runs = model.runs.map((run) => chip(run.name, !model.hidden.has(run.name), () => {
      switchIn(model.hidden, run.name);
      changed();
    }, {
      sample: swatch(run), title: `${run.name}: on or off; with Shift, this run alone`,
      only: () => {
        model.hidden = new Set(model.runs.map((each) => each.name).filter((name) => name !== run.name));
        changed();
      },
    }));
    if (model.runs.length > 2) {
      const set = (names) => () => {
        model.hidden = new Set(names);
        changed();
      };
      runs.push(el("button", { type: "button", "data-name": "\0all", onclick: set([]) }, "All"));
      runs.push(el("button", { type: "button", "data-name": "\0none", onclick: set(model.runs.map((run) => run.name)) }, "None"));
    }
    replaceChips("run-chips", runs);
    replaceChips("panel-chips", model.panels().map((base) => chip(base, model.shown.has(base), () => {
      switchIn(model.shown, base);
      changed();
    })));
    const sample = (dash, width) => drawn("svg", { class: "swatch", width: 22, height: 12, "aria-hidden": "true" },
      drawn("line", { x1: 1, x2: 21, y1: 6, y2: 6, stroke: "currentColor", "stroke-width": width, "stroke-dasharray": dash }));
    const kinds = [["train", "training", sample("5 4", 1.5)], ["valid", "validation", sample(null, 2.5)]];
    replaceChips("split-chips", kinds.map(([split, words, line]) => chip(words, model.splits.has(split), () => {
      switchIn(model.splits, split);
      changed();
    }, { sample: line })));
  },
};
