"use strict";
// Curves: one chart for each of the data's, all over the same axis.

const view = { unit: "step", layers: false, log: false, hidden: new Set(), range: null };
const plots = [];
const DASH = { main: [], dashed: [5, 4], layer: [] };
const SIGNS = { resumed: "↻", "step dropped": "×" };

function shown(chart) {
  return chart.series.filter((series) => !view.hidden.has(series.run) && (view.layers || series.style !== "layer"));
}

/** uPlot wants one x axis for all lines of a chart: the union of theirs. */
function aligned(series) {
  const tables = series.map((each) => [data.runs[each.run].places[each.at][view.unit], each.values]);
  const points = tables.map(([xs, ys]) => {
    const last = new Map(); // a later point at the same place replaces an earlier one
    xs.forEach((x, n) => { if (x !== null) last.set(x, ys[n]); });
    return last;
  });
  const xs = [...new Set(points.flatMap((line) => [...line.keys()]))].sort((a, b) => a - b);
  return [xs, ...points.map((line) => xs.map((x) => line.get(x) ?? null))];
}

/** The nearest point that a line has: lines of other runs have points elsewhere. */
function nearest(values, index) {
  for (let away = 0; away < values.length; away++) {
    for (const at of [index - away, index + away]) if ((values[at] ?? null) !== null) return at;
  }
  return index;
}

function drawMarks(plot) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.font = `${11 * devicePixelRatio}px system-ui`;
  data.runs.forEach((run, number) => {
    if (view.hidden.has(number)) return;
    for (const mark of run.marks) {
      const x = plot.valToPos(mark[view.unit], "x", true);
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.strokeStyle = ctx.fillStyle = runColor(number);
      ctx.globalAlpha = 0.7;
      ctx.lineWidth = devicePixelRatio;
      ctx.setLineDash([2 * devicePixelRatio, 3 * devicePixelRatio]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      ctx.fillText(SIGNS[mark.mark] ?? "⇄", x + 3 * devicePixelRatio, bbox.top + 11 * devicePixelRatio);
    }
  });
  ctx.restore();
}

function readout(place, series, plot) {
  const index = plot.cursor.idx;
  place.replaceChildren();
  if (index !== null && index !== undefined) {
    place.append(el("span", { text: `${view.unit} ${short(plot.data[0][index])}:` }));
  }
  for (const label of new Set(series.map((each) => each.label))) {
    const row = el("span", { text: label ? label + " " : "" });
    series.forEach((each, n) => {
      if (each.label !== label) return;
      const values = plot.data[n + 1];
      const value = short(values[nearest(values, index ?? values.length - 1)]);
      row.append(el("span", { title: data.runs[each.run].name }, runMark(each.run), el("b", { text: value }), " "));
    });
    place.append(row);
  }
}

function drawChart(entry) {
  const { chart, card } = entry;
  entry.plot?.destroy();
  const series = shown(chart);
  card.hidden = !series.length;
  if (!series.length) { entry.plot = null; return; }
  const axis = { stroke: () => css("--soft"), grid: { stroke: () => css("--line"), width: 1 }, ticks: { show: false },
    font: "11px system-ui", values: (_, splits) => splits.map((value) => (value === null ? "" : short(value))) };
  const values = series.flatMap((each) => each.values).filter((value) => value !== null);
  const log = view.log && values.every((value) => value > 0);
  const single = series.every((each) => each.values.filter((value) => value !== null).length < 2);
  entry.plot = new uPlot({
    width: Math.max(220, entry.box.clientWidth), height: 210, legend: { show: false },
    cursor: { sync: { key: "all" }, focus: { prox: 24 },
      dataIdx: (plot, n, index) => (n === 0 ? index : nearest(plot.data[n], index)) },
    focus: { alpha: 0.35 },
    scales: { x: { time: false, range: () => view.range ?? whole() }, y: { distr: log ? 3 : 1 } },
    axes: [{ ...axis, size: 28 }, { ...axis, size: 52 }],
    series: [{}, ...series.map((each) => ({
      stroke: () => runColor(each.run), alpha: each.style === "layer" ? 0.5 : 1, spanGaps: true,
      width: each.style === "main" ? 2 : 1.25, dash: DASH[each.style], points: { show: single || each.at === "evaluations" },
    }))],
    hooks: {
      draw: [drawMarks],
      setCursor: [(plot) => readout(entry.values, series, plot)],
      setSelect: [(plot) => {
        if (plot.select.width > 4) {
          zoom([plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")]);
        }
      }],
    },
  }, aligned(series), entry.box);
  entry.plot.over.addEventListener("dblclick", () => zoom(null));
  readout(entry.values, series, entry.plot);
}

/** All that any run did: every chart has the same axis. */
function whole() {
  const ends = data.runs.flatMap(({ places }) => Object.values(places).map((each) => each[view.unit].at(-1) ?? 0));
  return [0, Math.max(...ends) || 1];
}

/** The same range of x in all charts; null: all of it. */
function zoom(range) {
  view.range = range;
  const [min, max] = range ?? whole();
  for (const { plot } of plots) plot?.setScale("x", { min, max });
}

function drawCharts() {
  for (const entry of plots) if (entry.card.closest("details").open) drawChart(entry);
}

function curves() {
  if (!data.charts.length) return;
  show("curves", "Curves");
  for (const title of new Set(data.charts.map((chart) => chart.group))) {
    const grid = el("div", { class: "grid" });
    const group = el("details", { class: "group" }, el("summary", { text: title }), grid);
    group.open = !/self-attention/.test(title);
    for (const chart of data.charts.filter((each) => each.group === title)) {
      const box = el("div", { class: "plot" });
      const values = el("div", { class: "readout" });
      const card = el("div", { class: "card" }, el("h3", { text: chart.title }), box, values);
      grid.append(card);
      plots.push({ chart, card, box, values, plot: null });
    }
    byId("charts").append(group);
    group.addEventListener("toggle", drawCharts);
  }
  data.runs.forEach((run, number) => {
    const chip = el("button", { type: "button", "aria-pressed": "true" }, runMark(number), run.name);
    chip.addEventListener("click", () => {
      if (!view.hidden.delete(number)) view.hidden.add(number);
      chip.setAttribute("aria-pressed", String(!view.hidden.has(number)));
      drawCharts();
    });
    if (data.runs.length > 1) byId("chips").append(chip);
  });
  byId("unit").addEventListener("change", (event) => { view.unit = event.target.value; view.range = null; drawCharts(); });
  byId("layers").addEventListener("change", (event) => { view.layers = event.target.checked; drawCharts(); });
  byId("log").addEventListener("change", (event) => { view.log = event.target.checked; drawCharts(); });
  byId("unzoom").addEventListener("click", () => zoom(null));
  const notes = ["Drag to zoom, double-click for all."];
  const kinds = new Set(data.runs.flatMap((run) => run.marks.map((mark) => mark.mark)));
  for (const kind of kinds) notes.push(`${SIGNS[kind] ?? "⇄"} ${kind}.`);
  const averaged = Math.max(...data.runs.map((run) => run.averaged));
  if (averaged > 1) notes.push(`Training values are means of up to ${averaged} records.`);
  byId("curves-note").textContent = notes.join(" ");
  listeners.push(() => plots.forEach(({ plot }) => plot?.redraw(false)));
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's address bar that hides itself
    width = innerWidth;
    plots.forEach(({ plot, box }) => plot?.setSize({ width: box.clientWidth, height: 210 }));
  });
  drawCharts();
}
