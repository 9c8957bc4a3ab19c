// Starts the page.

function drawAll() {
  legend.draw(drawCurves);
  charts.draw();
  table.draw();
  facts.draw();
  media.draw();
  timeline.draw();
}

function drawCurves() {
  legend.draw(drawCurves);
  charts.draw();
  media.draw();
}

function take(data) {
  model.take(data);
  const count = `${data.runs.length} run${data.runs.length === 1 ? "" : "s"}`;
  byId("about").textContent = data.live ? count : `${count}, made ${moment(data.made)} by dtrain ${data.dtrain}`;
  document.title = data.runs.length === 1 ? `${data.runs[0].name} - dtrain report` : `${count} - dtrain report`;
}

function start() {
  const data = JSON.parse(byId("data").textContent);
  take(data);
  theme.start(drawAll);
  byId("x-axis").addEventListener("change", (event) => {
    model.x = event.target.value;
    model.range = null;
    charts.draw();
  });
  byId("log").addEventListener("change", (event) => {
    model.log = event.target.checked;
    charts.draw();
  });
  byId("zoom-in").addEventListener("click", () => charts.scale(0.5));
  byId("zoom-out").addEventListener("click", () => charts.scale(2));
  byId("pan-left").addEventListener("click", () => charts.pan(-0.25));
  byId("pan-right").addEventListener("click", () => charts.pan(0.25));
  byId("reset").addEventListener("click", () => charts.range(null));
  byId("all-keys").addEventListener("change", () => facts.config());
  table.start(drawCurves, drawAll);
  drawAll();
  if (data.live) {
    live.say("live");
    live.start((fresh) => {
      take(fresh);
      drawAll();
    }, data);
  }
  performance.mark("dtrain-drawn");
}

start();
