"use strict";
// The attention explorer: which image, detection or place is looked at, in which layer and head, and what is drawn.

const explorer = data.explorer;
const state = { image: 0, run: 0, query: null, view: "query", points: [], layer: null, head: "mean", scale: "shared", all: false };
const VIEWS = {
  query: "A detection",
  place: "A place",
  all: "All detections",
  points: "Several places",
};
const HINTS = {
  query: "Click a box: what its query read of the image (cross-attention of the decoder), in every run.",
  place: "Click anywhere: what the encoder's token there read (self-attention of the encoder).",
  all: "Each detection's cross-attention in its own colour: figure 6 of the DETR paper.",
  points: "Click places, up to six: what each one's token read in the encoder: figure 3 of the DETR paper.",
};
const POINTS = ["#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#00a6a6"];
const tileSets = []; // of the current picture, a row for each run: for saving

const hueColor = (n) => `hsl(${(n * 137.5) % 360} 85% 55%)`;
const here = (run) => explorer.runs[run].images[state.image];
const nameOf = (run) => data.runs[explorer.runs[run].run].name;
const site = () => (state.view === "query" || state.view === "all" ? "cross" : "encoder");
const layersOf = (kind) => Math.max(...explorer.runs.map((run) => run.layers[kind]));
const heads = () => Math.max(...explorer.runs.map((run) => run.heads));
const layer = () => (state.layer === null ? layersOf(site()) - 1 : Math.min(state.layer, layersOf(site()) - 1));

/** Positions, among a run's kept queries, of those that are detections. */
function found(run) {
  return here(run).queries.map((_, n) => n).filter((n) => here(run).scores[n] >= explorer.threshold);
}

/** The position of the chosen query in each run; -1: none. */
function chosen(run) {
  const own = here(state.run);
  const at = own.queries.indexOf(state.query);
  if (at < 0) return -1;
  return run === state.run ? at : counterpart(here(run), own.boxes[at], own.names[at]);
}

async function mapAt(run, row) {
  const image = here(run);
  const block = image.blocks[`${site()}/${layer()}/${state.head}`];
  if (block === undefined || row < 0) return null;
  const cells = image.grid[0] * image.grid[1];
  const rows = site() === "cross" ? image.queries.length : image.places.length;
  return rowOf(await readBlock(block, rows, cells), row, image.grid);
}

// ---- links and keys

function toLink() {
  const { image, run, query, view, points, layer, head, scale } = state;
  const parts = { image: explorer.images[image].id, run, view, layer: layer ?? "last", head, scale };
  if (query !== null) parts.query = query;
  if (points.length) parts.places = points.map((point) => point.map((value) => value.toFixed(3)).join(",")).join(";");
  history.replaceState(null, "", "#" + new URLSearchParams(parts));
}

function fromLink() {
  const parts = new URLSearchParams(location.hash.slice(1));
  if (!parts.has("image")) return false;
  const number = (name, most) => {
    const value = parts.get(name) === null ? NaN : Number(parts.get(name));
    return Number.isInteger(value) && value >= 0 && value < most ? value : null;
  };
  const image = explorer.images.findIndex((each) => each.id === parts.get("image"));
  state.image = Math.max(0, image);
  state.run = number("run", explorer.runs.length) ?? 0;
  state.view = parts.get("view") in VIEWS ? parts.get("view") : "query";
  state.layer = number("layer", 100);
  state.head = number("head", heads()) ?? "mean";
  state.scale = parts.get("scale") === "own" ? "own" : "shared";
  const points = (parts.get("places") ?? "").split(";").map((pair) => pair.split(",").map(Number));
  state.points = points.filter((point) => point.length === 2 && point.every((value) => value >= 0 && value <= 1)).slice(0, 6);
  const query = number("query", 1e6);
  state.query = here(state.run).queries.includes(query) ? query : null;
  settle();
  return true;
}

/** Something to look at: the surest detection, or the middle of the image. */
function settle() {
  if (!here(state.run).queries.includes(state.query)) state.query = here(state.run).queries[0];
  if (!state.points.length) state.points = [[0.5, 0.5]];
  if (state.view === "place") state.points = state.points.slice(-1);
}

function change(changes) {
  const query = chosen(changes.run ?? state.run);
  if (changes.image !== undefined && changes.image !== state.image) changes = { ...changes, query: null, points: [] };
  else if (changes.run !== undefined && changes.query === undefined) changes.query = here(changes.run).queries[query];
  Object.assign(state, changes);
  settle();
  toLink();
  draw();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  const names = ["mean", ...Array(heads()).keys()];
  const head = names.indexOf(state.head);
  const wrapped = (value, count) => (value + count) % count;
  const keys = {
    ArrowUp: () => ({ layer: wrapped(layer() + 1, layersOf(site())) }),
    ArrowDown: () => ({ layer: wrapped(layer() - 1, layersOf(site())) }),
    ArrowRight: () => ({ head: names[wrapped(head + 1, names.length)] }),
    ArrowLeft: () => ({ head: names[wrapped(head - 1, names.length)] }),
    "[": () => ({ image: wrapped(state.image - 1, explorer.images.length) }),
    "]": () => ({ image: wrapped(state.image + 1, explorer.images.length) }),
  };
  const run = Number(event.key) - 1;
  const changes = keys[event.key]?.() ?? (explorer.runs[run] && event.key !== " " ? { run } : null);
  if (changes) { event.preventDefault(); change(changes); }
}

// ---- controls

function controls(largest) {
  const press = (id, on) => byId(id).setAttribute("aria-pressed", String(on));
  for (const view of Object.keys(VIEWS)) press("view-" + view, view === state.view);
  const averaged = state.head === "mean" && state.view !== "all";
  byId("hint").textContent = HINTS[state.view] + (averaged ? " Numbers are those of the averaged map." : "");
  fill("layer", [...Array(layersOf(site())).keys()].map((n) => [n, `layer ${n}` + (n === layersOf(site()) - 1 ? " (last)" : "")]), layer());
  fill("head", [["mean", "mean of heads"], ...[...Array(heads()).keys()].map((n) => [n, `head ${n}`])], state.head);
  byId("own").checked = state.scale === "own";
  byId("own").parentElement.hidden = state.view === "all";
  byId("legend").hidden = state.view === "all";
  byId("legend-most").textContent = state.scale === "own" ? "each map's largest" : short(largest);
  byId("strip").childNodes.forEach((button, n) => button.setAttribute("aria-pressed", String(n === state.image)));
  const there = here(state.run);
  byId("queries").hidden = site() !== "cross";
  byId("queries").replaceChildren(el("span", { class: "note", text: `queries of ${nameOf(state.run)}:` }), ...there.queries.map((query, n) => {
    const chip = el("button", { type: "button", text: `${there.names[n]} ${there.scores[n].toFixed(2)}`, title: `query ${query}`,
      "aria-pressed": String(state.view === "query" && query === state.query) });
    chip.addEventListener("click", () => change({ query, view: "query" }));
    return chip;
  }));
}

function fill(id, options, value) {
  byId(id).replaceChildren(...options.map(([key, text]) => el("option", { value: key, text })));
  byId(id).value = value;
}

function thumbnail(n) {
  const image = explorer.images[n];
  const went = explorer.runs.map((run) => run.images[n].went).filter(Boolean);
  const words = explorer.worst.includes(n) && went.length ? "worst: F1 " + (went.reduce((sum, each) => sum + each.f1, 0) / went.length).toFixed(2) : image.id;
  const button = el("button", { type: "button", "aria-pressed": "false", title: `image ${image.id}` },
    el("img", { src: image.photo, alt: `image ${image.id}` }), el("span", { text: words }));
  button.addEventListener("click", () => { change({ image: n }); byId("attention").scrollIntoView(); });
  return button;
}

function saveButtons() {
  return ["png", "svg"].map((kind) => {
    const button = el("button", { type: "button", id: "save-" + kind, text: kind.toUpperCase() });
    button.addEventListener("click", () => {
      const { id } = explorer.images[state.image];
      const rows = tileSets.filter((row) => row.length);
      const many = state.view === "points";
      const where = `${site() === "cross" ? "cross-attention of the decoder" : "self-attention of the encoder"}, layer ${layer()}, ${state.head === "mean" ? "mean of heads" : "head " + state.head}`;
      save(sheet(many ? rows : [rows.flat()], `image ${id}: ${where}`), `attention_${id.replace(/[^\w.-]+/g, "_")}`, kind);
    });
    return button;
  });
}

function explore() {
  const views = Object.entries(VIEWS).map(([view, text]) => {
    const button = el("button", { type: "button", id: "view-" + view, text });
    button.addEventListener("click", () => change({ view }));
    return button;
  });
  const select = (id, read) => {
    const made = el("select", { id, "aria-label": id });
    made.addEventListener("change", () => change({ [id]: read(made.value) }));
    return made;
  };
  const check = (id, text, changes) => {
    const box = el("input", { type: "checkbox", id });
    box.addEventListener("change", () => change(changes(box.checked)));
    return el("label", {}, box, " " + text);
  };
  const place = byId("explorer");
  place.tabIndex = 0;
  place.append(
    el("div", { class: "strip", id: "strip" }, ...explorer.images.map((_, n) => thumbnail(n))),
    el("div", { class: "bar" }, el("span", { class: "views" }, ...views), select("layer", Number),
      select("head", (value) => (value === "mean" ? value : Number(value))),
      check("own", "each map its own scale", (on) => ({ scale: on ? "own" : "shared" })),
      check("every", "boxes of all queries", (on) => ({ all: on })),
      el("span", {}, "save as ", ...saveButtons())),
    el("p", { class: "note" }, el("span", { id: "hint" }), " ",
      el("span", { class: "keys", text: "Keys: ↑↓ layer, ←→ head, 1–9 run, [ ] image." })),
    el("div", { class: "stage", id: "stage", style: `--columns:${Math.min(3, explorer.runs.length)}` }),
    el("p", { class: "legend", id: "legend" }, el("span", { class: "nothing" }), " exactly 0: nothing ",
      el("span", { class: "ramp", style: `background:linear-gradient(90deg,${COLORS.map((c) => `rgb(${c})`).join(",")})` }), " ",
      el("span", { id: "legend-most" }), el("span", { text: " (colours follow the square root of the weight)" })),
    el("div", { class: "chips", id: "queries" }));
  place.addEventListener("keydown", onKey);
  show("attention", "Attention");
  addEventListener("hashchange", () => { if (fromLink()) draw(); });
  listeners.push(draw);
  const linked = fromLink();
  settle();
  draw().then(() => { if (linked) byId("attention").scrollIntoView(); });
  if (explorer.worst.length) {
    byId("worst").append(el("h3", { text: "Worst images" }), el("p", { class: "note",
      text: `Lowest F1 of detections with a score of ${explorer.threshold} or more, mean over the runs, in ${explorer.scanned} of ${explorer.validation} validation images.` }),
      el("div", { class: "strip" }, ...explorer.worst.map(thumbnail)));
  }
}

if (explorer) explore();
