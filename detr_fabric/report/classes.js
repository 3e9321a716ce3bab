"use strict";
// The classes: AP and best F1 of each, the kinds of errors, calibration, and which classes are taken for which.

const figures = data.figures ?? data.runs.map(() => null);
const score = (value) => (value === null || value === undefined ? "–" : value.toFixed(3));
const MEASURES = {
  AP: [(name, run, row) => row.values[run], percent, "AP"],
  f1: [(name, run) => figures[run]?.F1_class[name]?.f1, percent, "best F1"],
  threshold: [(name, run) => figures[run]?.F1_class[name]?.threshold, score, "score of the best F1"],
  precision: [(name, run) => figures[run]?.F1_class[name]?.precision, percent, "precision at the best F1"],
  recall: [(name, run) => figures[run]?.F1_class[name]?.recall, percent, "recall at the best F1"],
};

function classesTable() {
  if (!data.classes.length) return;
  let [order, shown] = [{ column: 0, up: false }, "AP"];
  const [body, foot] = [el("tbody"), el("tbody")];
  const draw = () => {
    const [read, write] = MEASURES[shown];
    const rows = data.classes.map((row) => ({ name: row.name, values: data.runs.map((_, run) => read(row.name, run, row) ?? null) }));
    const key = (row) => (order.column < 0 ? row.name : row.values[order.column] ?? -1);
    rows.sort((a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0) * (order.up ? 1 : -1));
    body.replaceChildren(...rows.map(({ name, values }) => {
      const best = shown === "threshold" ? null : Math.max(...values.map((value) => value ?? -1));
      return el("tr", {}, el("td", { text: name }), ...values.map((value) =>
        el("td", { text: write(value), class: values.length > 1 && value !== null && value === best ? "best" : "" })));
    }));
    const all = figures.map((each) => el("td", { text: write(each?.F1[shown]) }));
    foot.replaceChildren(...(shown === "AP" ? [] : [el("tr", {}, el("td", { text: "all, at one score" }), ...all)]));
  };
  const heading = (column, ...content) => {
    const button = el("button", { type: "button" }, ...content);
    button.addEventListener("click", () => { order = { column, up: order.column === column ? !order.up : column < 0 }; draw(); });
    return el("th", {}, button);
  };
  const heads = data.runs.map((run, number) => heading(number, runMark(number), run.name));
  byId("classes-table").append(el("thead", {}, el("tr", {}, heading(-1, "class"), ...heads)), body, foot);
  byId("classes-note").textContent = `${data.classes.length} classes; AP of the best evaluation, in %`;
  if (figures.some(Boolean)) {
    byId("measure").append(...Object.entries(MEASURES).map(([value, [, , text]]) => el("option", { value, text })));
    byId("measure").addEventListener("change", () => { shown = byId("measure").value; draw(); });
    byId("measures").hidden = false;
  }
  draw();
  show("classes", "Classes");
}

// ---- errors and calibration

function errorsTable() {
  if (!figures.some(Boolean)) return;
  const row = (text, title, cells) => el("tr", {}, el("td", { text, title }), ...figures.map((each) =>
    el("td", {}, ...(each ? cells(each) : ["–"]))));
  const small = (text) => el("small", { text: ` ${text}` });
  const kinds = [
    ["localisation", "localisation", "the right class, but an IoU between 0.1 and 0.5"],
    ["classification", "classification", "the right place, but another class"],
    ["both", "both of these", "another class, and an IoU between 0.1 and 0.5"],
    ["duplicate", "duplicates", "detections of an object that another one has found"],
    ["background", "background", "detections where there is no object"],
    ["missed", "missed objects", "those at which no error of localisation or classification aims"],
  ];
  const rows = kinds.map(([kind, text, title]) => row(text, title, ({ tide }) =>
    [percent(tide.delta_AP50[kind]), small(tide.counts[kind].toLocaleString("en"))]));
  const heads = data.runs.map((run, number) => el("th", {}, runMark(number), run.name));
  const table = el("table", { id: "errors-table" }, el("thead", {}, el("tr", {}, el("th", { text: "AP50 lost to" }), ...heads)), el("tbody", {}, ...rows,
    row("near-identical pairs", "of detections of one class with an IoU of 0.8 or more", ({ duplicates }) =>
      [duplicates.pairs.toLocaleString("en"), small(`in ${duplicates.detections.toLocaleString("en")}`)]),
    row("calibration error", "mean distance of score and share that is right", ({ calibration }) => [percent(calibration.error)])));
  const { threshold } = figures.find(Boolean).duplicates;
  const steps = figures.map((each, run) => (each ? `${data.runs[run].name} at step ${each.step ?? "–"}` : "")).filter(Boolean).join(", ");
  const note = "What AP50 would gain, in %, without the errors of one kind (TIDE), and how many of them there are at any score. Pairs are of "
    + `detections with a score of ${threshold} or more. Best F1, errors and calibration are of the last evaluation: ${steps}.`;
  byId("errors").append(el("div", { class: "scroll" }, table), el("p", { class: "note", text: note }));
  byId(data.mistakes?.length ? "errors" : "confusion").append(calibrationChart());
}

/** Share of right detections over mean score in ten bins of scores; a calibrated detector lies on the diagonal. */
function calibrationChart() {
  const [left, top, side] = [34, 8, 220];
  const at = (x, y) => [left + x * side, top + (1 - y) * side];
  const chart = svg("svg", { viewBox: "0 0 270 264", class: "calibration", role: "img", "aria-label": "calibration" });
  const line = (points, more) => svg("polyline", { points: points.map((point) => point.join(",")).join(" "), fill: "none", ...more });
  const word = (x, y, text, anchor) => svg("text", { x, y, "text-anchor": anchor, "font-size": 11, fill: "var(--soft)", text });
  chart.append(svg("rect", { x: left, y: top, width: side, height: side, fill: "none", stroke: "var(--line)" }),
    line([at(0, 0), at(1, 1)], { stroke: "var(--soft)", "stroke-dasharray": "3 4" }));
  for (const tick of [0, 0.5, 1]) {
    chart.append(word(at(tick, 0)[0], top + side + 14, String(tick), "middle"), word(left - 6, at(0, tick)[1] + 4, String(tick), "end"));
  }
  chart.append(word(left + side / 2, top + side + 30, "mean score", "middle"));
  figures.forEach((each, run) => {
    const bins = each ? each.calibration.bins.filter((bin) => bin.detections) : [];
    chart.append(line(bins.map((bin) => at(bin.score, bin.precision)), { stroke: runPaint(run), "stroke-width": 1.5 }));
    for (const bin of bins) {
      const [cx, cy] = at(bin.score, bin.precision);
      const text = `${data.runs[run].name}: mean score ${score(bin.score)}, right ${score(bin.precision)} of ${bin.detections} detections`;
      const dot = svg("circle", { cx, cy, r: 3.5, fill: runPaint(run) });
      dot.append(svg("title", { text }));
      chart.append(dot);
    }
  });
  return el("figure", {}, chart, el("figcaption", { class: "note", text: "Share of detections that are right, over their mean score." }));
}

// ---- mistakes

function mistakesTable() {
  if (!data.mistakes?.length) return;
  const { threshold, scanned, validation, runs } = data.explorer;
  const head = el("tr", {}, el("th", { text: "mistake" }), ...runs.map(({ run }) => el("th", {}, runMark(run), data.runs[run].name)));
  const body = el("tbody", {}, ...data.mistakes.map((row) => el("tr", {}, el("td", { text: row.what }), ...row.values.map((count, n) =>
    el("td", {}, String(count), el("small", { text: row.of[n] ? ` of ${row.of[n]}` : "" }))))));
  byId("confusion").append(el("div", { class: "scroll tall" }, el("table", {}, el("thead", {}, head), body)), el("p", { class: "note",
    text: `Most frequent mistakes of detections with a score of ${threshold} or more, at an IoU of 0.5, in ${scanned} of ${validation} validation images.` }));
  byId("confusion").append(...runs.filter((run) => run.confusion).map(confusionTable));
  if (!data.classes.length) show("classes", "Classes");
}

/** Objects by row, what they were found as by column, shaded by their part of the row. */
function confusionTable({ run, confusion: { names, counts } }) {
  const head = el("tr", {}, el("th", {}, runMark(run), data.runs[run].name), ...[...names, "missed"].map((text) => el("th", { text })));
  const body = el("tbody", {}, ...[...names, "nothing there"].map((text, row) => {
    const total = counts[row].reduce((sum, count) => sum + count, 0) || 1;
    return el("tr", {}, el("td", { text }), ...counts[row].map((count, column) => {
      const corner = row === names.length && column === names.length;
      const share = Math.round((60 * count) / total);
      return el("td", { text: corner ? "" : String(count), style: corner || !count ? "" : `background:color-mix(in srgb, var(--run${run % 6}) ${share}%, transparent)` });
    }));
  }));
  return el("div", { class: "scroll confusion" }, el("table", {}, el("thead", {}, head), body));
}

classesTable();
errorsTable();
mistakesTable();
