// The pool as a map, and each request's block table beside its progress.

import { $, context2d, h, number, theme, tooltip } from "./dom.js";
import { colour, onColour } from "./history.js";

const FREE = 0;
const CACHED = 1;
const SHARED = 3;
const SIZES = [18, 15, 13, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2];
const TALLEST = 300;
const MAX_ROWS = 14;
const MAX_CHIPS = 24;
const SQUARE = 24;
const NAMES = ["free", "cached, free to be reused", "in use", "shared"];

let map = null;
let drawn = null; // what the pointer is over is found in this
let chosen = null; // a request whose blocks stand out

export function startBlocks(canvas) {
  map = canvas;
  map.addEventListener("mousemove", (event) => drawn && tooltip(describe(event.offsetX, event.offsetY), event));
  map.addEventListener("mouseleave", () => tooltip(null));
}

/** Runs -> one number for each cell. */
function cellsOf({ map }) {
  const cells = [];
  for (let at = 0; at < map.length; at += 2) for (let count = 0; count < map[at + 1]; count++) cells.push(map[at]);
  return cells;
}

function blocksOf(request) {
  const blocks = [];
  for (let at = 0; at < (request.table?.length ?? 0); at += 2) for (let count = 0; count < request.table[at + 1]; count++) blocks.push(request.table[at] + count);
  return blocks;
}

/** cell -> the requests that have blocks in it, and where in their table. */
function ownersOf(state) {
  const owners = new Map();
  for (const request of state.running) {
    blocksOf(request).forEach((block, place) => {
      const cell = Math.floor(block / state.pool.per_cell);
      if (!owners.has(cell)) owners.set(cell, []);
      const list = owners.get(cell);
      if (list.at(-1)?.request !== request) list.push({ request, place });
    });
  }
  return owners;
}

export function drawBlocks(state) {
  const cells = cellsOf(state.pool);
  const owners = ownersOf(state);
  const width = map.clientWidth;
  const size = SIZES.find((side) => Math.ceil(cells.length / Math.floor(width / side)) * side <= TALLEST) ?? 2;
  const columns = Math.floor(width / size);
  const rows = Math.ceil(cells.length / columns);
  drawn = { cells, owners, size, columns, state };
  const context = context2d(map, width, rows * size + 2);
  const colours = theme();
  const gap = size > 8 ? 2 : size > 3 ? 1 : 0;
  cells.forEach((kind, cell) => {
    const [x, y] = [(cell % columns) * size, Math.floor(cell / columns) * size];
    drawCell(context, kind, owners.get(cell), x, y, size - gap, colours);
  });
  drawLegend(state);
}

function drawCell(context, kind, owners, x, y, side, colours) {
  const radius = side > 7 ? 2.5 : 0;
  if (kind === FREE || kind === CACHED) {
    context.fillStyle = kind === FREE ? colours.faint : colours.cached;
    context.beginPath();
    context.roundRect(x, y, side, side, radius);
    context.fill();
    if (kind === CACHED && side > 5) stripe(context, x, y, side, colours);
    return;
  }
  const seen = owners?.slice(0, 4) ?? [];
  context.save();
  context.beginPath();
  context.roundRect(x, y, side, side, radius);
  context.clip();
  context.globalAlpha = chosen !== null && !seen.some(({ request }) => request.id === chosen) ? 0.25 : 1;
  const part = side / Math.max(1, seen.length);
  seen.forEach(({ request }, place) => {
    context.fillStyle = colour(request.id);
    context.fillRect(x + place * part, y, part + 0.5, side);
  });
  if (!seen.length) {
    context.fillStyle = colours.soft;
    context.fillRect(x, y, side, side);
  }
  context.restore();
  if (kind === SHARED && side > 4) {
    context.strokeStyle = colours.ink;
    context.lineWidth = 1.2;
    context.beginPath();
    context.roundRect(x + 0.6, y + 0.6, side - 1.2, side - 1.2, radius);
    context.stroke();
  }
}

function stripe(context, x, y, side, colours) {
  context.strokeStyle = colours.card;
  context.lineWidth = 1;
  context.beginPath();
  context.moveTo(x + 1, y + side - 1);
  context.lineTo(x + side - 1, y + 1);
  context.stroke();
}

function describe(x, y) {
  const { cells, owners, size, columns, state } = drawn;
  const column = Math.floor(x / size);
  const cell = Math.floor(y / size) * columns + column;
  if (column >= columns || cell >= cells.length) return null;
  const { per_cell: many, blocks } = state.pool;
  const first = cell * many;
  const name = many === 1 ? `Block ${number(first)}` : `Blocks ${number(first)} to ${number(Math.min(blocks, first + many) - 1)}`;
  const tokens = state.engine.block_size;
  const who = (owners.get(cell) ?? []).slice(0, 8).map(({ request, place }) => `#${request.id}: its tokens ${number(place * tokens)} to ${number((place + 1) * tokens - 1)}`);
  return [`${name}: ${NAMES[cells[cell]]}`, ...who];
}

function drawLegend(state) {
  const { pool, engine } = state;
  const entries = [
    ["used", `in use, in its request's colour (${number(pool.used)})`],
    ["shared", `shared by several (${number(pool.shared)})`],
    ["cached", `free, content kept for reuse (${number(pool.cached)})`],
    ["free", `free (${number(pool.blocks - pool.used - pool.cached)})`],
  ];
  const scale = pool.per_cell === 1 ? `a square is one block of ${engine.block_size} tokens` : `a square is ${pool.per_cell} blocks of ${engine.block_size} tokens, in the colour of its busiest`;
  $("map-legend").replaceChildren(...entries.map(([kind, text]) => h("span", {}, h("i", { class: `cell ${kind}` }), text)), h("span", { class: "scale" }, scale));
  map.setAttribute("aria-label", `${pool.blocks} blocks: ${entries.map(([, text]) => text).join("; ")}`);
}

/** Who waits, in the order in which they will be admitted. */
export function drawQueue(box, state) {
  const shown = state.waiting.slice(0, MAX_CHIPS);
  const chips = shown.map((request) => {
    const chip = h("span", { class: "chip", title: `${number(request.prompt)} prompt tokens${request.preemptions ? ", preempted" : ""}` }, `#${request.id}`);
    chip.style.backgroundColor = colour(request.id);
    return chip;
  });
  const hidden = state.num_waiting - shown.length;
  box.replaceChildren(h("span", { class: "empty" }, state.num_waiting ? `${number(state.num_waiting)} waiting:` : "The queue is empty."), ...chips, hidden > 0 ? `and ${number(hidden)} more` : "");
}

/** The list of requests: state, progress, block table. Rows are kept from draw to draw, so that the pointer can rest on one. */
export function drawTables(box, state) {
  const shown = state.running.slice(0, MAX_ROWS);
  const rows = new Map([...box.querySelectorAll(".request")].map((row) => [Number(row.dataset.id), row]));
  const owners = ownersOf(state);
  const colours = theme();
  const elements = shown.map((request) => {
    const row = rows.get(request.id) ?? newRow(request);
    fillRow(row, request);
    return row;
  });
  const hidden = state.num_running - shown.length;
  if (!shown.length) elements.push(h("p", { class: "empty" }, "No request is running."));
  if (hidden > 0) elements.push(h("p", { class: "empty" }, `and ${number(hidden)} more that run`));
  if (elements.length !== box.children.length || elements.some((element, place) => box.children[place] !== element)) box.replaceChildren(...elements);
  for (const element of elements) if (element.classList.contains("request")) drawTable(element.lastChild, element.request, owners, state, colours);
}

function newRow(request) {
  const chip = h("span", { class: "chip" }, `#${request.id}`);
  const row = h("div", { class: "request", "data-id": request.id }, chip, h("span", { class: "state" }), h("span", { class: "numbers" }), h("span", { class: "progress" }, h("i"), h("i")), h("canvas", { role: "img" }));
  row.addEventListener("mouseenter", () => choose(request.id));
  row.addEventListener("mouseleave", () => choose(null));
  return row;
}

function choose(id) {
  chosen = id;
  if (drawn) drawBlocks(drawn.state);
}

function fillRow(row, request) {
  row.request = request;
  const [chip, what, numbers, progress] = row.children;
  chip.style.backgroundColor = colour(request.id);
  const prefill = request.computed < request.prompt;
  what.textContent = prefill ? "prompt" : request.preemptions && request.computed < request.prompt + request.output - 1 ? "again" : "writing";
  const cached = request.cached ? `, ${number(request.cached)} cached` : "";
  numbers.textContent = `${number(Math.min(request.computed, request.prompt))}/${number(request.prompt)} prompt${cached} · ${number(request.output)} written · ${number(request.blocks)} blocks`;
  const [prompt, output] = progress.children;
  prompt.style.width = `${(100 * Math.min(request.computed, request.prompt)) / request.limit}%`;
  output.style.width = `${(100 * request.output) / request.limit}%`;
  prompt.style.backgroundColor = output.style.backgroundColor = colour(request.id);
  row.title = `${request.name}, at most ${number(request.limit)} tokens`;
}

function drawTable(canvas, request, owners, state, colours) {
  const blocks = blocksOf(request);
  canvas.hidden = !blocks.length;
  if (!blocks.length) return;
  const width = canvas.clientWidth;
  const fits = Math.max(1, Math.floor(width / (SQUARE + 2)) - (blocks.length * (SQUARE + 2) > width ? 1 : 0));
  const context = context2d(canvas, width, 17);
  context.font = "600 9px system-ui, sans-serif";
  context.textAlign = "center";
  blocks.slice(0, fits).forEach((block, place) => {
    const x = place * (SQUARE + 2);
    const cell = Math.floor(block / state.pool.per_cell);
    const sharers = state.pool.per_cell === 1 ? (owners.get(cell) ?? []) : [{ request }];
    const kind = sharers.length > 1 ? SHARED : 2;
    drawSquare(context, kind, sharers, x, colours);
    context.fillStyle = onColour();
    context.fillText(block < 10000 ? String(block) : `${Math.floor(block / 1000)}k`, x + SQUARE / 2, 12);
  });
  context.textAlign = "left";
  context.fillStyle = colours.soft;
  if (blocks.length > fits) context.fillText(`+${request.blocks - fits}`, fits * (SQUARE + 2) + 1, 12);
  canvas.setAttribute("aria-label", `Blocks of request ${request.id} in order: ${blocks.slice(0, 20).join(", ")}`);
}

function drawSquare(context, kind, sharers, x, colours) {
  const part = SQUARE / Math.min(4, sharers.length);
  context.save();
  context.beginPath();
  context.roundRect(x, 1, SQUARE, 15, 3);
  context.clip();
  sharers.slice(0, 4).forEach(({ request }, place) => {
    context.fillStyle = colour(request.id);
    context.fillRect(x + place * part, 1, part + 0.5, 15);
  });
  context.restore();
  if (kind !== SHARED) return;
  context.strokeStyle = colours.ink;
  context.lineWidth = 1.2;
  context.beginPath();
  context.roundRect(x + 0.6, 1.6, SQUARE - 1.2, 13.8, 3);
  context.stroke();
}
