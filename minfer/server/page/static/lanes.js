// The steps as lanes: time to the right, a lane a request, the newest step at the right edge. Below: how full each step's budget was.
//
// A fast engine makes a hundred steps a second, and most are like the one before: everyone says one more token. Such steps are
// folded into one column, but for the newest, so that what is different (joining, leaving, prompts) stays in sight for long.

import { context2d, duration, number, theme, tooltip } from "./dom.js";
import { DECODE, LANES, RECOMPUTE, colour, onColour } from "./history.js";

const LANE = 19;
const COLUMN = 17;
const WIDE = 25; // with numbers in it
const LEFT = 4;
const BUDGET = 46; // height of the strip below
const UNFOLDED = 14; // of the newest steps
const FOLDED = 34; // width of a column that stands for many

let canvas = null;
let shown = []; // columns from the left: { x, width, step (its last), first, count, us }
let hovered = null;
let last = null;

export function startLanes(element) {
  canvas = element;
  canvas.addEventListener("mousemove", (event) => {
    hovered = event.offsetX;
    const column = shown.find(under);
    tooltip(column ? describe(column) : null, event);
    if (last) drawLanes(...last);
  });
  canvas.addEventListener("mouseleave", () => {
    hovered = null;
    tooltip(null);
    if (last) drawLanes(...last);
  });
}

const under = ({ x, width }) => hovered !== null && hovered >= x && hovered < x + width;

/** The columns that fit, from the newest step back. */
function columnsOf(steps, total) {
  const columns = [];
  let room = total - LEFT;
  for (let place = steps.length - 1; place >= 0; place--) {
    const step = steps[place];
    const after = columns.at(-1);
    if (steps.length - place > UNFOLDED && after?.folds && isLike(step, after.first)) {
      room -= after.count === 1 ? FOLDED - COLUMN : 0;
      Object.assign(after, { first: step, count: after.count + 1, us: after.us + step.total, width: FOLDED });
    } else {
      const width = step.rows.some((row) => row.kind !== DECODE && row.tokens > 99) ? WIDE : COLUMN;
      room -= width;
      columns.push({ step, first: step, count: 1, us: step.total, width, folds: steps.length - place > UNFOLDED });
    }
    if (room < 0) {
      columns.pop();
      break;
    }
  }
  let x = LEFT;
  for (const column of columns.reverse()) {
    column.x = x;
    x += column.width;
  }
  return columns;
}

const isLike = (step, next) => isPlain(step) && isPlain(next) && step.rows.length === next.rows.length && step.rows.every((row, place) => row.id === next.rows[place].id);
const isPlain = (step) => !step.preempted.length && step.rows.every((row) => row.kind === DECODE && !row.drafts);

export function drawLanes(history, state) {
  last = [history, state];
  const width = canvas.clientWidth;
  shown = columnsOf(history.steps, width);
  const lanes = Math.min(LANES, Math.max(6, 1 + Math.max(-1, ...shown.flatMap(({ step }) => [...step.lanes.keys()]))));
  const colours = theme();
  const context = context2d(canvas, width, lanes * LANE + BUDGET + 18);
  background(context, width, lanes, colours);
  const overflow = shown.length ? shown.at(-1).step.num_rows - shown.at(-1).step.lanes.size : 0;
  shown.forEach((column, place) => drawColumn(context, column, shown[place - 1]?.step, lanes, state.engine.max_num_batched_tokens, colours));
  context.fillStyle = colours.soft;
  context.font = "11px system-ui, sans-serif";
  const budget = `tokens in the step, of at most ${number(state.engine.max_num_batched_tokens)} (log scale)`;
  context.fillText(overflow ? `${budget}; ${overflow} more requests run than there are lanes` : budget, LEFT, lanes * LANE + 13);
  if (!shown.length) context.fillText("Nothing has run while you looked. Ask something, or press a button above.", LEFT, 14);
  canvas.setAttribute("aria-label", shown.length ? `The last steps. Newest: ${describe(shown.at(-1)).join("; ")}` : "No steps yet");
}

function background(context, width, lanes, colours) {
  context.strokeStyle = colours.line;
  context.lineWidth = 1;
  for (let lane = 0; lane <= lanes; lane++) {
    context.beginPath();
    context.moveTo(0, lane * LANE + 0.5);
    context.lineTo(width, lane * LANE + 0.5);
    context.stroke();
  }
}

function drawColumn(context, column, before, lanes, budget, colours) {
  const { step, x, width, count } = column;
  const height = lanes * LANE + BUDGET + 18;
  if (under(column)) {
    context.fillStyle = colours.faint;
    context.fillRect(x, 0, width, height);
  }
  for (const [lane, row] of step.lanes) {
    const goesOn = before?.lanes.get(lane)?.id === row.id;
    if (count > 1) drawFolded(context, row, x, lane * LANE, width, goesOn);
    else drawRow(context, row, x, lane * LANE, width, goesOn, colours);
  }
  const scale = (BUDGET - 14) / Math.log2(1 + budget);
  const bar = (tokens, alpha) => {
    context.globalAlpha = alpha;
    context.fillStyle = colours.accent;
    context.fillRect(x + 2, height - Math.log2(1 + tokens) * scale, width - 4, Math.log2(1 + tokens) * scale);
    context.globalAlpha = 1;
  };
  bar(step.tokens, 0.35);
  bar(step.tokens - step.prompt, 1);
  if (count === 1) return;
  context.fillStyle = colours.soft;
  context.font = "600 10px system-ui, sans-serif";
  context.textAlign = "center";
  context.fillText(`×${number(count)}`, x + width / 2, height - Math.log2(1 + step.tokens) * scale - 4);
  context.textAlign = "left";
}

/** Many tokens of one request: a line of dots. */
function drawFolded(context, row, x, y, width, goesOn) {
  const middle = y + LANE / 2;
  context.fillStyle = colour(row.id);
  context.globalAlpha = 0.4;
  context.fillRect(goesOn ? x - COLUMN / 2 : x + 4, middle - 1, width + (goesOn ? COLUMN / 2 : -4), 2);
  context.globalAlpha = 1;
  for (const share of [0.2, 0.4, 0.6, 0.8]) {
    context.beginPath();
    context.arc(x + share * width, middle, 2.2, 0, 7);
    context.fill();
  }
}

function drawRow(context, row, x, y, width, goesOn, colours) {
  const fill = colour(row.id);
  const middle = y + LANE / 2;
  context.fillStyle = fill;
  if (goesOn) {
    context.globalAlpha = 0.4;
    context.fillRect(x - COLUMN / 2, middle - 1, (COLUMN + width) / 2, 2);
    context.globalAlpha = 1;
  }
  if (row.kind === DECODE) drawToken(context, row, x + width / 2, middle, fill);
  else drawChunk(context, row, x, y, width, colours);
}

function drawToken(context, row, x, y, fill) {
  context.beginPath();
  context.arc(x, row.drafts ? y - 3 : y, row.drafts ? 3 : 3.6, 0, 7);
  context.fill();
  if (!row.drafts) return;
  const width = COLUMN - 4;
  const kept = (width * row.accepted) / row.drafts;
  context.strokeStyle = fill;
  context.lineWidth = 1;
  context.fillRect(x - width / 2, y + 2.5, kept, 4);
  context.strokeRect(x - width / 2 + 0.5, y + 3, width - 1, 3);
}

function drawChunk(context, row, x, y, width, colours) {
  context.beginPath();
  context.roundRect(x + 0.5, y + 2, width - 1, LANE - 4, 3);
  context.fill();
  if (row.joined && row.start > 0) hatch(context, x + 0.5, y + 2, width - 1, 5, colours.card);
  if (row.kind === RECOMPUTE) {
    context.strokeStyle = colours.ink;
    context.setLineDash([2, 2]);
    context.stroke();
    context.setLineDash([]);
  }
  context.fillStyle = onColour();
  context.font = "600 9.5px system-ui, sans-serif";
  context.textAlign = "center";
  const text = row.tokens < 1000 ? String(row.tokens) : `${(row.tokens / 1000).toFixed(row.tokens < 9950 ? 1 : 0)}k`;
  context.fillText(text, x + width / 2, y + LANE / 2 + (row.joined && row.start > 0 ? 5 : 3));
  context.textAlign = "left";
}

function hatch(context, x, y, width, height, colour) {
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  context.strokeStyle = colour;
  context.lineWidth = 1.4;
  for (let at = -height; at < width; at += 4) {
    context.beginPath();
    context.moveTo(x + at, y + height);
    context.lineTo(x + at + height, y);
    context.stroke();
  }
  context.restore();
}

const KINDS = ["decodes", "prompt", "recomputes"];

function describe({ step, first, count, us }) {
  const rows = step.rows.slice(0, 12).map((row) => {
    if (row.kind === DECODE) return `#${row.id} says a token${count > 1 ? " in each" : ""}${row.drafts ? ` and checks ${row.drafts} drafts: ${row.accepted} right` : ""}`;
    const cached = row.joined && row.start ? `, ${number(row.start)} before them from the cache` : "";
    return `#${row.id} ${KINDS[row.kind]} tokens ${number(row.start)} to ${number(row.start + row.tokens - 1)}${cached}`;
  });
  if (step.num_rows > rows.length) rows.push(`and ${step.num_rows - rows.length} more`);
  if (step.preempted.length) rows.push(`preempted: ${step.preempted.map((id) => `#${id}`).join(", ")}`);
  if (step.copies) rows.push(step.copies === 1 ? "1 block copied" : `${step.copies} blocks copied`);
  if (count > 1) return [`Steps ${number(first.step)} to ${number(step.step)}: ${number(step.tokens)} tokens each, ${duration(us / count)} each`, ...rows];
  return [`Step ${number(step.step)}: ${number(step.tokens)} tokens in ${duration(us)}`, ...rows];
}
