"use strict";
// Maps of attention: how a block is read (report/maps.py writes it), and how weights become a picture.

const read = new Map(); // blocks that were read, by their text

/** {codes: Uint8Array (rows × cells), numbers: Float32Array (rows × 5)} of a block. */
function readBlock(text, rows, cells) {
  if (!read.has(text)) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    read.set(text, new Response(stream).arrayBuffer().then((buffer) => ({
      codes: new Uint8Array(buffer, 0, rows * cells),
      numbers: new Float32Array(buffer.slice(rows * cells)),
    })));
  }
  return read.get(text);
}

/** One row of a block: its weights, 0 exactly where the model's are, else to about 1 %; and its exact numbers. */
function rowOf({ codes, numbers }, row, grid, layout) {
  const cells = grid[0] * grid[1];
  const [largest, keys, near, entropy, inside] = numbers.subarray(5 * row, 5 * row + 5);
  const weights = Array.from(codes.subarray(row * cells, (row + 1) * cells), (code) => largest * (code / 255) ** 2);
  return { weights, grid, largest, keys, near, entropy, inside, cells, ...layout };
}

// Dark violet to light yellow, as matplotlib's inferno.
const COLORS = [[66, 10, 104], [120, 28, 109], [165, 44, 96], [207, 68, 70], [237, 105, 37], [251, 155, 6], [247, 209, 61], [252, 255, 164]];

/** The colour of a part of the largest weight, in [0, 1], as [css colour, opacity]. Never nothing: 0 is not asked for. */
function heat(part) {
  const at = Math.min(1, Math.max(0, part)) * (COLORS.length - 1);
  const low = Math.min(COLORS.length - 2, Math.floor(at));
  const mixed = COLORS[low].map((value, n) => Math.round(value + (at - low) * (COLORS[low + 1][n] - value)));
  return [`rgb(${mixed.join(",")})`, 0.45 + 0.5 * Math.min(1, part)];
}

const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") made.textContent = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** A photo of width × height units; dim: so that colours on it can be read. */
function photoTile(image, dim) {
  const [width, height] = image.size;
  const tile = svg("svg", { viewBox: `0 0 ${width} ${height}`, xmlns: SVG },
    svg("image", { href: image.photo, width, height, preserveAspectRatio: "none" }));
  if (dim) tile.append(svg("rect", { width, height, fill: "#0b0b12", "fill-opacity": dim }));
  return tile;
}

/** Adds a cell for every weight that is not exactly 0; paint(part) gives colour and opacity, or null for nothing. */
function addCells(tile, image, map, scale, paint) {
  const [h, w] = map.grid;
  const [width, height] = [image.size[0] / w, image.size[1] / h];
  const cells = svg("g", { class: "cells", "shape-rendering": "crispEdges" });
  map.weights.forEach((weight, n) => {
    if (weight === 0) return;
    const painted = paint(Math.sqrt(weight / scale));
    if (painted === null) return;
    cells.append(svg("rect", { x: (n % w) * width, y: Math.floor(n / w) * height, width, height,
      fill: painted[0], "fill-opacity": painted[1].toFixed(3) }));
  });
  tile.append(cells);
  return tile;
}

/** A box [left, top, right, bottom] in [0, 1] of the image. */
function boxOf(image, [left, top, right, bottom], attributes) {
  const [width, height] = image.size;
  return svg("rect", { x: left * width, y: top * height, width: Math.max(0, right - left) * width,
    height: Math.max(0, bottom - top) * height, fill: "none", "vector-effect": "non-scaling-stroke", ...attributes });
}

function overlap(a, b) {
  const side = (low, high) => Math.max(0, Math.min(a[high], b[high]) - Math.max(a[low], b[low]));
  const area = (box) => Math.max(0, box[2] - box[0]) * Math.max(0, box[3] - box[1]);
  const shared = side(0, 2) * side(1, 3);
  return shared / Math.max(1e-12, area(a) + area(b) - shared);
}

/** The position, among the queries that a run keeps, of the one that stands for the same thing as a box of another run:
 * of its class with an IoU of 0.5 the surest, else the one that overlaps most, by 0.3 at least; -1: none. */
function counterpart(there, box, name) {
  const shared = there.boxes.map((each) => overlap(each, box));
  const same = shared.findIndex((value, n) => value >= 0.5 && there.names[n] === name); // surest first
  if (same >= 0) return same;
  const most = shared.indexOf(Math.max(...shared));
  return shared[most] >= 0.3 ? most : -1;
}

/** The position, among the kept places, of the nearest one to a point in [0, 1]². */
function nearestPlace({ places, grid: [h, w] }, [x, y]) {
  const away = places.map((token) => ((token % w) + 0.5 - x * w) ** 2 + (Math.floor(token / w) + 0.5 - y * h) ** 2);
  return away.indexOf(Math.min(...away));
}

// ---- saving

/** One SVG of labelled pictures in rows, on white: rows of {title, tile, size, lines: {text, color?}}. */
function sheet(rows, heading) {
  const [gap, side, line] = [16, 420, 17];
  const font = { "font-family": "DejaVu Sans, Helvetica, Arial, sans-serif", fill: "#1d1d1f" };
  const whole = svg("svg", { xmlns: SVG });
  let [y, widest] = [gap + 24, 0];
  for (const row of rows) {
    let [x, tallest] = [gap, 0];
    for (const { title, tile, lines, size: [width, height] } of row) {
      const scale = side / width;
      const copy = tile.cloneNode(true);
      for (const [name, value] of Object.entries({ x, y: y + 22, width: side, height: height * scale })) copy.setAttribute(name, value);
      whole.append(svg("text", { x, y: y + 13, "font-size": 14, "font-weight": 600, ...font, text: title }), copy);
      lines.forEach(({ text, color }, n) => {
        const below = y + 22 + height * scale + line * (n + 1);
        if (color) whole.append(svg("rect", { x, y: below - 9, width: 10, height: 10, fill: color }));
        whole.append(svg("text", { x: x + (color ? 16 : 0), y: below, "font-size": 12, ...font, text }));
      });
      tallest = Math.max(tallest, 22 + height * scale + line * (lines.length + 0.5));
      x += side + gap;
    }
    widest = Math.max(widest, x);
    y += tallest + gap;
  }
  [widest, y] = [Math.ceil(widest), Math.ceil(y)];
  whole.prepend(svg("rect", { width: widest, height: y, fill: "#fff" }),
    svg("text", { x: gap, y: gap + 12, "font-size": 15, ...font, text: heading }));
  for (const [name, value] of Object.entries({ width: widest, height: y, viewBox: `0 0 ${widest} ${y}` })) whole.setAttribute(name, value);
  return whole;
}

function download(name, url) {
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

function save(picture, name, kind) {
  const source = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(new XMLSerializer().serializeToString(picture));
  if (kind === "svg") { download(name + ".svg", source); return; }
  const image = new Image();
  image.onload = () => {
    const canvas = el("canvas", { width: 2 * image.width, height: 2 * image.height });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => {
      const url = URL.createObjectURL(blob);
      download(name + ".png", url);
      setTimeout(() => URL.revokeObjectURL(url), 10_000);
    });
  };
  image.src = source;
}
