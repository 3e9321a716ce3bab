"use strict";
// Tables, and what all scripts of the page share. Text goes into the page by textContent alone, so that no name of a run or class is ever HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const byId = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const runPaint = (run) => (run < 6 ? `var(--run${run})` : `hsl(${(run * 137.5) % 360} 55% 50%)`);
const runColor = (run) => (run < 6 ? css("--run" + run) : runPaint(run));

/** An element with a text, attributes and children. */
function el(tag, { text, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function runMark(run) {
  return el("span", { class: "mark", style: `background:${runPaint(run)}` });
}

/** A number with as many digits as a reader wants; – for none. */
function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (value !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));
}

// ---- light and dark

const listeners = []; // what has to be drawn again in other colours
function setTheme(dark) {
  root.classList.toggle("dark", dark);
  for (const listener of listeners) listener();
}
const system = matchMedia("(prefers-color-scheme: dark)");
setTheme(system.matches);
system.addEventListener("change", () => setTheme(system.matches));
byId("theme").addEventListener("click", () => setTheme(!root.classList.contains("dark")));

function show(id, title) {
  byId(id).hidden = false;
  byId("nav").append(el("a", { href: "#" + id, text: title }));
}

// ---- runs

const percent = (value) => (value === null || value === undefined ? "–" : (100 * value).toFixed(1));
const FORMATS = {
  hours: (value) => (value === null ? "–" : value.toFixed(2)),
  "images/s": (value) => (value === null ? "–" : value.toFixed(1)),
  parameters: (value) => (value === null ? "–" : (value / 1e6).toFixed(1) + " M"),
  commit: (value) => (value === null ? "–" : value.slice(0, 10) + (value.endsWith("-dirty") ? "-dirty" : "")),
};
const SCORES = ["AP", "AP50", "AP75", "APs", "APm", "APl"];
const WORDS = ["mapping", "backbone", "commit", "device"];

function runsTable() {
  const columns = Object.keys(Object.assign({}, ...data.runs.map((run) => run.row)));
  const used = columns.filter((name) => data.runs.some((run) => (run.row[name] ?? null) !== null));
  const head = el("tr", {}, el("th", { text: "run" }));
  for (const name of used) head.append(el("th", { text: name, class: WORDS.includes(name) ? "text" : "" }));
  byId("runs-table").append(el("thead", {}, head));
  const body = el("tbody");
  data.runs.forEach((run, number) => {
    const row = el("tr", {}, el("td", {}, runMark(number), el("span", { class: "long", text: run.name, title: run.name })));
    for (const name of used) {
      const value = run.row[name] ?? null;
      const score = SCORES.includes(name);
      const best = score && data.runs.length > 1 && value !== null
        && value === Math.max(...data.runs.map((other) => other.row[name] ?? -1));
      const text = score ? percent(value) : (FORMATS[name] ?? ((each) => (each === null ? "–" : String(each))))(value);
      row.append(el("td", { text, class: (best ? "best " : "") + (WORDS.includes(name) ? "text" : "") }));
    }
    body.append(row);
  });
  byId("runs-table").append(body);
  show("runs", "Runs");
}

// ---- settings that differ

function settingsTable() {
  const { heads, rows } = data.settings;
  if (!rows.length) return;
  const head = el("tr", {}, el("th", { text: "setting" }));
  for (const each of heads) {
    if (typeof each === "number") head.append(el("th", { class: "text" }, runMark(each), data.runs[each].name));
    else head.append(el("th", { class: "text", text: each }));
  }
  byId("settings-table").append(el("thead", {}, head));
  const body = el("tbody");
  for (const { name, values } of rows) {
    const row = el("tr", {}, el("td", { text: name }));
    values.forEach((value, number) => {
      const changed = number > 0 && value !== values[0];
      row.append(el("td", { text: value ?? "absent", class: changed ? "text changed" : "text" }));
    });
    body.append(row);
  }
  byId("settings-table").append(body);
  const single = typeof heads[0] === "string";
  byId("settings-note").textContent = single ? "that differ from the defaults"
    : `the ${rows.length} that differ; marked where another value than the first run's`;
  show("settings", "Settings");
}

byId("title").textContent = data.runs.length === 1 ? data.runs[0].name : `${data.runs.length} DETR runs`;
document.title = data.runs.map((run) => run.name).join(" · ");
byId("made").textContent = `Made ${data.made} by detr_fabric.report. Charts: uPlot, MIT licence.`;
runsTable();
settingsTable();
curves();
