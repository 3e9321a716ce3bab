"use strict";
// What the attention explorer draws: for each run the photo with boxes to click, and the maps that are asked for.

function outlined(image, box, color, dashed) {
  const group = svg("g", {}, boxOf(image, box, { stroke: "#000", "stroke-opacity": 0.6, "stroke-width": dashed ? 3 : 4 }),
    boxOf(image, box, { stroke: color, "stroke-width": dashed ? 1.5 : 2, ...(dashed ? { "stroke-dasharray": "5 4" } : {}) }));
  return group;
}

/** The photo with boxes to click. */
function picker(run) {
  const image = explorer.images[state.image];
  const there = here(run);
  const tile = photoTile(image, 0);
  for (const { box } of image.objects) tile.append(outlined(image, box, "#fff", true));
  const selected = chosen(run);
  const cross = site() === "cross";
  const area = ([left, top, right, bottom]) => (right - left) * (bottom - top);
  const shown = there.queries.map((_, n) => n).filter((n) => state.all || n === selected || there.scores[n] >= explorer.threshold);
  for (const n of shown.sort((a, b) => area(there.boxes[b]) - area(there.boxes[a]))) { // small ones on top
    const on = state.view === "query" && n === selected;
    const color = on ? "#00e5ff" : state.view === "all" ? hueColor(n) : runColor(explorer.runs[run].run);
    tile.append(outlined(image, there.boxes[n], color, there.scores[n] < explorer.threshold && !on));
    const label = `${there.names[n]} ${there.scores[n].toFixed(2)}`;
    const target = boxOf(image, there.boxes[n], { fill: "#fff", "fill-opacity": on ? 0.12 : 0, class: "hit",
      "data-query": there.queries[n], "pointer-events": cross ? "all" : "none", role: "button", "aria-label": label,
      ...(cross ? { tabindex: 0 } : {}) });
    target.append(svg("title", { text: label }));
    const choose = () => change({ run, query: there.queries[n], view: "query" });
    target.addEventListener("click", (event) => { event.stopPropagation(); choose(); });
    target.addEventListener("keydown", (event) => { if (event.key === "Enter") choose(); });
    tile.append(target);
  }
  if (!cross) tile.append(...pointMarks(image, run));
  tile.classList.add("picker");
  tile.addEventListener("click", (event) => {
    const frame = tile.getBoundingClientRect();
    const point = [(event.clientX - frame.left) / frame.width, (event.clientY - frame.top) / frame.height];
    if (state.view === "points") {
      const fresh = state.points.length >= POINTS.length ? [] : state.points;
      change({ run, points: [...fresh, point] });
    } else change({ run, view: "place", points: [point] });
  });
  return tile;
}

/** Where the places lie: the middle of the kept token that is nearest to the click. */
function pointMarks(image, run, only) {
  const there = here(run);
  const [h, w] = there.grid;
  const size = Math.max(...image.size);
  return state.points.map((point, n) => {
    const token = there.places[nearestPlace(there, point)];
    const [x, y] = [((token % w) + 0.5) / w * image.size[0], (Math.floor(token / w) + 0.5) / h * image.size[1]];
    const mark = svg("g", { class: "point" }, svg("circle", { cx: x, cy: y, r: size / 42, fill: POINTS[n], stroke: "#fff",
      "stroke-width": 2, "vector-effect": "non-scaling-stroke" }));
    if (state.view === "points") {
      mark.append(svg("text", { x, y: y + size / 95, "font-size": size / 32, "text-anchor": "middle", fill: "#fff",
        "font-weight": 700, "font-family": "sans-serif", text: String(n + 1) }));
    }
    return mark;
  }).filter((_, n) => only === undefined || n === only);
}

function numbersOf(map, query) {
  const share = (value) => (100 * value).toFixed(value > 0 && value < 0.01 ? 2 : 1) + " %";
  return {
    keys: `${map.keys} of ${map.cells}`,
    zeros: share(1 - map.keys / map.cells),
    "≤ 1e-6": share(map.near / map.cells),
    entropy: map.entropy.toFixed(2) + " nats",
    largest: short(map.largest),
    ...(query ? { "in its box": share(map.inside) } : {}),
  };
}

function numberList(numbers) {
  const list = el("dl", { class: "numbers" });
  for (const [name, value] of Object.entries(numbers)) {
    list.append(el("div", { "data-number": name }, el("dt", { text: name }), el("dd", { text: value })));
  }
  return list;
}

/** What each run shows: [{title, map, box?, point?}], without a map where the page has none. */
async function wanted(run) {
  const there = here(run);
  const queryTitle = (n) => `${there.names[n]} ${there.scores[n].toFixed(2)} · query ${there.queries[n]}`;
  if (state.view === "query") {
    const n = chosen(run);
    return n < 0 ? [] : [{ title: queryTitle(n), map: await mapAt(run, n), box: there.boxes[n], query: there.queries[n] }];
  }
  if (state.view === "all") {
    return Promise.all(found(run).map(async (n) => ({ title: queryTitle(n), map: await mapAt(run, n), box: there.boxes[n], color: hueColor(n) })));
  }
  return Promise.all(state.points.map(async (point, n) => ({ title: `place ${n + 1}`, map: await mapAt(run, nearestPlace(there, point)), point: n })));
}

/** The maps of a run as tiles for the page and for saving: {title, tile, size, lines, numbers, map}. */
function tilesOf(run, wishes, largest) {
  const image = explorer.images[state.image];
  const drawn = wishes.filter((wish) => wish.map);
  if (state.view === "all") {
    const tile = photoTile(image, 0.45);
    for (const { map, color } of drawn) addCells(tile, image, map, map.largest, (part) => (part < 0.2 ? null : [color, 0.9 * part ** 2]));
    for (const { box, color } of drawn) tile.append(outlined(image, box, color));
    return [{ title: nameOf(run), tile, size: image.size, lines: drawn.map((wish) => ({ text: wish.title, color: wish.color })), drawn }];
  }
  return drawn.map(({ title, map, box, query, point }) => {
    const tile = addCells(photoTile(image, 0.35), image, map, state.scale === "own" ? map.largest : largest, heat);
    if (box) tile.append(outlined(image, box, "#00e5ff"));
    if (point !== undefined) tile.append(...pointMarks(image, run, point));
    const numbers = numbersOf(map, query !== undefined);
    const words = Object.entries(numbers).map(([name, value]) => `${name} ${value}`);
    const lines = [title, words.slice(0, 3).join(", "), words.slice(3).join(", ")].map((text) => ({ text }));
    return { title: nameOf(run), tile, size: image.size, lines, numbers, map, name: title };
  });
}

/** The photo with the places, which a saved figure shows first. */
function placesTile(run) {
  const image = explorer.images[state.image];
  const tile = photoTile(image, 0);
  tile.append(...pointMarks(image, run));
  return { title: nameOf(run), tile, size: image.size, lines: [{ text: "the places" }] };
}

function missing(run) {
  if (state.view === "query" && chosen(run) < 0) return "This run has no query whose box overlaps that one by 0.3 or more.";
  if (state.view === "all" && !found(run).length) return "No detection scores high enough.";
  if (layer() >= explorer.runs[run].layers[site()]) return `This run has no layer ${layer()} there.`;
  return "Left out to keep the page small: write it with fewer images, or a larger --megabytes.";
}

function underPointer(tile, map, place) {
  tile.addEventListener("pointermove", (event) => {
    const frame = tile.getBoundingClientRect();
    const [h, w] = map.grid;
    const [row, column] = [Math.floor((event.clientY - frame.top) / frame.height * h), Math.floor((event.clientX - frame.left) / frame.width * w)];
    const weight = map.weights[row * w + column];
    if (weight !== undefined) place.textContent = `row ${row}, column ${column}: ` + (weight === 0 ? "exactly 0" : "≈ " + short(weight));
  });
  tile.addEventListener("pointerleave", () => { place.textContent = ""; });
}

let drawing = 0;
async function draw() {
  const mine = ++drawing;
  const wishes = await Promise.all(explorer.runs.map((_, run) => wanted(run)));
  if (mine !== drawing) return; // another click was faster
  const largest = Math.max(1e-6, ...wishes.flat().map((wish) => wish.map?.largest ?? 0));
  tileSets.length = 0;
  byId("stage").replaceChildren(...explorer.runs.map((each, run) => {
    const tiles = tilesOf(run, wishes[run], largest);
    tileSets.push(state.view === "points" && tiles.length ? [placesTile(run), ...tiles] : tiles);
    const column = el("div", { class: "column" + (run === state.run ? " active" : ""), "data-run": run });
    const { went } = here(run);
    const words = went ? `${each.mapping} · F1 ${went.f1.toFixed(2)}: ${went.missed} of ${went.of} missed, ${went.false} false` : each.mapping;
    column.append(el("h3", {}, runMark(each.run), nameOf(run), el("small", { text: words })));
    const maps = el("div", { class: tiles.length > 1 ? "maps many" : "maps" });
    for (const { tile, numbers, map, name, drawn } of tiles) {
      const pointer = el("span", { class: "pointer" });
      if (map) underPointer(tile, map, pointer);
      const words = el("div", { class: "caption" }, name ? el("b", { text: name }) : "");
      for (const wish of drawn ?? []) words.append(el("span", { class: "chip", style: `border-color:${wish.color}`, text: wish.title }));
      words.append(pointer);
      maps.append(el("figure", {}, tile, el("figcaption", {}, words, numbers ? numberList(numbers) : "")));
    }
    if (!tiles.length || (state.view === "all" && !tiles[0].drawn.length)) maps.replaceChildren(el("p", { class: "none", text: missing(run) }));
    const [width, height] = explorer.images[state.image].size;
    const shape = { class: width <= 1.2 * height ? "pair square" : "pair", style: `--ratio:${width}/${height}` };
    column.append(el("div", shape, picker(run), maps));
    return column;
  }));
  controls(largest);
}
