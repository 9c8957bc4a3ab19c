// Images, histograms, texts and files of the runs that are shown, each name a figure with its epochs.

const WIDTH = 320;
const HEIGHT = 120;

function bars(one) {
  const most = Math.max(...one.counts, 1);
  const [low, high] = [one.edges[0], one.edges[one.edges.length - 1]];
  const each = WIDTH / one.counts.length;
  const boxes = one.counts.map((count, place) => drawn("rect", {
    x: place * each, width: Math.max(each - 0.5, 0.5), y: HEIGHT * (1 - count / most), height: (HEIGHT * count) / most,
  }));
  const words = `${one.counts.reduce((sum, count) => sum + count, 0)} numbers from ${tick(low)} to ${tick(high)}`;
  return el("div", {},
    drawn("svg", { class: "bars", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": words }, ...boxes),
    el("p", { class: "scale" }, el("span", {}, tick(low)), el("span", {}, tick(high))));
}

function content(kind, name, one) {
  if (one.missing) return el("p", { class: "hint" }, `${one.missing}${one.file ? `: ${one.file}` : ""}`);
  if (kind === "image") return el("img", { src: `data:image/png;base64,${one.image}`, alt: `${name}, epoch ${one.epoch}` });
  if (kind === "histogram") return bars(one);
  if (kind === "text") return el("pre", { tabindex: "0" }, one.text);
  return el("p", {}, one.file);
}

const media = {
  chosen: new Map(), // of a figure, the epoch that a person has moved to

  figure(run, series) {
    const key = JSON.stringify([run.name, series.kind, series.name]);
    const shown = el("div", { class: "shown" });
    const said = el("span", {});
    const show = (place) => {
      const one = series.moments[place];
      shown.replaceChildren(content(series.kind, series.name, one));
      said.textContent = `epoch ${one.epoch}, step ${one.step}`;
    };
    const last = series.moments.length - 1;
    const wanted = series.moments.findIndex((one) => one.epoch === this.chosen.get(key));
    const place = wanted < 0 ? last : wanted;
    const slider = el("input", { type: "range", min: 0, max: last, value: place, "aria-label": `epoch of ${series.name}, ${run.name}` });
    slider.addEventListener("input", () => {
      show(Number(slider.value));
      if (Number(slider.value) === last) this.chosen.delete(key);
      else this.chosen.set(key, series.moments[Number(slider.value)].epoch);
    });
    show(place);
    const more = series.all > series.moments.length ? ` (${series.moments.length} of ${series.all})` : "";
    return el("figure", { class: "medium", "data-name": series.name, "data-run": run.name },
      el("figcaption", {}, swatch(run), model.all.length > 1 ? `${run.name}: ` : "", series.name),
      shown, el("div", { class: "bar" }, last > 0 ? slider : null, said, more));
  },

  draw() {
    const runs = model.visible().filter((run) => (run.media || []).length);
    byId("media-section").hidden = !runs.length;
    const all = runs.flatMap((run) => run.media.map((series) => ({ run, series })));
    const names = new Map(); // those of one name stand side by side
    for (const one of all) names.set(one.series.name, [...(names.get(one.series.name) || []), one]);
    byId("media").replaceChildren(...[...names.values()].flat().map(({ run, series }) => this.figure(run, series)));
  },
};
