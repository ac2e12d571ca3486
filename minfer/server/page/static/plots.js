// Three plots from the steps and the finished requests: throughput, where a step's time goes, latency.

import { context2d, duration, number, theme } from "./dom.js";

const HEIGHT = 120;
const LEFT = 46;
const BOTTOM = 16;
const WINDOW = 60e6; // microseconds
const BUCKET = 1e6;
const BAR = 5;

/** Axes with a nice upper end; returns what turns a value into a height. */
function axes(context, width, top, format, caption, colours) {
  const nice = niceAbove(top);
  const base = HEIGHT - BOTTOM;
  context.font = "10px system-ui, sans-serif";
  context.fillStyle = colours.soft;
  context.strokeStyle = colours.line;
  context.textAlign = "right";
  for (const share of [0, 0.5, 1]) {
    const y = Math.round(base - share * (base - 8)) + 0.5;
    context.beginPath();
    context.moveTo(LEFT, y);
    context.lineTo(width, y);
    context.stroke();
    context.fillText(format(nice * share), LEFT - 5, y + 3);
  }
  context.fillText(caption, width, HEIGHT - 3);
  context.textAlign = "left";
  return (value) => base - (Math.min(value, nice) / nice) * (base - 8);
}

function niceAbove(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1e-9)));
  return [1, 2, 5, 10].find((step) => step * power >= value) * power;
}

export function drawThroughput(canvas, history, state) {
  const colours = theme();
  const width = canvas.clientWidth;
  const context = context2d(canvas, width, HEIGHT);
  const end = Math.floor(state.now / BUCKET); // whole buckets only: the newest one is still filling
  const count = WINDOW / BUCKET;
  const said = Array(count).fill(0);
  const prompt = Array(count).fill(0);
  for (const step of history.steps) {
    const place = Math.floor((step.at + step.total) / BUCKET) - end + count;
    if (place < 0 || place >= count) continue;
    said[place] += step.said;
    prompt[place] += step.prompt;
  }
  const y = axes(context, width, Math.max(10, ...said, ...prompt), short, "the last minute", colours);
  const x = (place) => LEFT + ((place + 1) / count) * (width - LEFT);
  line(context, prompt, x, y, colours.soft);
  line(context, said, x, y, colours.accent);
  canvas.setAttribute("aria-label", `Tokens a second now: ${said.at(-1)} generated, ${prompt.at(-1)} of prompts`);
}

function line(context, values, x, y, colour) {
  context.strokeStyle = colour;
  context.lineWidth = 1.8;
  context.lineJoin = "round";
  context.beginPath();
  values.forEach((value, place) => context[place ? "lineTo" : "moveTo"](x(place), y(value)));
  context.stroke();
}

const short = (value) => (value < 1000 ? number(value) : `${(value / 1000).toFixed(value < 9950 ? 1 : 0).replace(".0", "")}k`);

export function drawStepTimes(canvas, history) {
  const colours = theme();
  const width = canvas.clientWidth;
  const context = context2d(canvas, width, HEIGHT);
  const steps = history.steps.slice(-Math.floor((width - LEFT) / BAR));
  const y = axes(context, width, Math.max(1000, ...steps.map((step) => step.total)), duration, `${steps.length} steps`, colours);
  const base = HEIGHT - BOTTOM;
  steps.forEach(({ us: [schedule, build, forward, sample, update, output] }, place) => {
    const x = width - (steps.length - place) * BAR;
    let below = 0;
    for (const [part, fill] of [[forward, colours.accent], [sample, colours.warn], [schedule + build + update + output, colours.soft]]) {
      context.fillStyle = fill;
      context.fillRect(x, y(below + part), BAR - 1, y(below) - y(below + part));
      below += part;
    }
  });
  context.fillStyle = colours.line;
  context.fillRect(LEFT, base, width - LEFT, 1);
  canvas.setAttribute("aria-label", steps.length ? `The newest step took ${duration(steps.at(-1).total)}` : "No steps yet");
}

export function drawLatency(canvas, history) {
  const colours = theme();
  const width = canvas.clientWidth;
  const context = context2d(canvas, width, HEIGHT);
  const room = Math.floor((width - LEFT) / 7);
  const ends = history.ended.slice(-room).filter((end) => end.first_token_us !== null);
  const times = ends.flatMap((end) => [end.first_token_us, end.per_token_us ?? end.first_token_us]);
  const low = Math.floor(Math.log10(Math.min(1e4, ...times)));
  const high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(1e5, ...times))));
  const base = HEIGHT - BOTTOM;
  const y = (us) => base - ((Math.log10(us) - low) / (high - low)) * (base - 8);
  context.font = "10px system-ui, sans-serif";
  for (let power = low; power <= high; power++) {
    context.strokeStyle = colours.line;
    context.beginPath();
    context.moveTo(LEFT, y(10 ** power));
    context.lineTo(width, y(10 ** power));
    context.stroke();
    context.fillStyle = colours.soft;
    context.textAlign = "right";
    context.fillText(decade(power), LEFT - 5, y(10 ** power) + 3);
  }
  const first = ends.map((end) => end.first_token_us);
  context.fillText(first.length ? `median to the first token ${duration(median(first))}` : "no request has finished while this was open", width, HEIGHT - 3);
  context.textAlign = "left";
  ends.forEach((end, place) => {
    const x = width - (ends.length - place) * 7 + 3;
    dot(context, x, y(end.first_token_us), colours.accent);
    if (end.per_token_us) dot(context, x, y(end.per_token_us), colours.warn);
  });
  canvas.setAttribute("aria-label", first.length ? `${first.length} requests; median time to the first token ${duration(median(first))}` : "No finished requests yet");
}

/** The upper one of two in the middle; undefined of nothing. */
export const median = (values) => values.sort((a, b) => a - b)[Math.floor(values.length / 2)];

const decade = (power) => (power < 3 ? `${10 ** power} µs` : power < 6 ? `${10 ** (power - 3)} ms` : `${10 ** (power - 6)} s`);

function dot(context, x, y, fill) {
  context.fillStyle = fill;
  context.beginPath();
  context.arc(x, y, 2.6, 0, 7);
  context.fill();
}
