// The live view: asks for the engine's state while it can be seen, and hands it to the panels.

import { $, bytes, drawIcons, duration, h, icon, number } from "./dom.js";
import { request } from "./api.js";
import { drawBlocks, drawQueue, drawTables, startBlocks } from "./blocks.js";
import { startExperiments } from "./experiments.js";
import { History } from "./history.js";
import { drawLanes, startLanes } from "./lanes.js";
import { drawLatency, drawStepTimes, drawThroughput, median } from "./plots.js";

const BUSY_MS = 200;
const IDLE_MS = 1000;
const FAILED_MS = 2000;

const history = new History();
let state = null;
let paused = false;
let timer = 0;
let asking = false;

export function startEngineView() {
  $("engine").append(...panels());
  drawIcons($("engine"));
  startLanes($("lanes"), history);
  startBlocks($("map"));
  startExperiments($("experiments"));
  $("pause").addEventListener("click", () => {
    paused = !paused;
    $("pause").replaceChildren(icon(paused ? "play" : "pause"), paused ? "Go on" : "Pause");
    $("pause").setAttribute("aria-pressed", String(paused));
    ask();
  });
  document.addEventListener("view", ask);
  document.addEventListener("visibilitychange", ask);
  document.addEventListener("theme", draw);
  new ResizeObserver(draw).observe($("engine"));
  ask();
}

const visible = () => !document.hidden && $("engine").offsetParent !== null;

/** One question at a time, the next when this one is answered: a slow engine is asked less often. */
async function ask() {
  if (asking || paused || !visible()) return;
  asking = true;
  clearTimeout(timer);
  let wait = FAILED_MS;
  try {
    const news = await (await request(`/v1/engine/state?since=${history.lastStep}`)).json();
    history.take(news);
    state = news;
    wait = news.num_running || news.num_waiting ? BUSY_MS : IDLE_MS;
    $("engine-error").hidden = true;
    draw();
  } catch (error) {
    $("engine-error").hidden = false;
    $("engine-error").textContent = error.message;
    if (error.status === 401) document.dispatchEvent(new CustomEvent("key-needed", { detail: error.message }));
  }
  asking = false;
  timer = setTimeout(ask, wait);
}

function draw() {
  if (!state || !visible()) return;
  drawTiles();
  drawLanes(history, state);
  drawBlocks(state);
  drawQueue($("queue"), state);
  drawTables($("requests"), state);
  drawThroughput($("throughput"), history, state);
  drawStepTimes($("step-times"), history);
  drawLatency($("latency"), history);
}

function panels() {
  return [
    h("p", { class: "error", id: "engine-error", role: "alert", hidden: true }),
    h("div", { class: "tiles", id: "tiles" }),
    panel("Try it", null, null, h("div", { id: "experiments" })),
    panel("Steps", "continuous-batching", "A column is one step of the engine, a lane one request: prompts come in chunks (bars), then each step says one token (dots). Requests join and leave at any step.",
      h("canvas", { id: "lanes", role: "img" }), legend([["chunk", "part of a prompt"], ["dot", "one token"], ["kept", "drafts kept"], ["lost", "drafts rejected"], ["hatch", "from the cache"]]),
      h("button", { type: "button", class: "button small", id: "pause", "aria-pressed": "false", "data-icon": "pause" }, "Pause")),
    panel("KV blocks", "paged-attention", "All memory for keys and values, in blocks of some tokens. A request takes any free ones, so nothing is reserved and nothing is moved.",
      h("canvas", { id: "map", role: "img" }), h("div", { class: "legend", id: "map-legend" })),
    panel("Requests and their block tables", "prefix-sharing", "The table says where each stretch of a request's tokens lies. Split squares are shared: several requests read the same block.",
      h("div", { class: "row wrap", id: "queue" }), h("div", { id: "requests" })),
    h("div", { class: "plots" },
      panel("Throughput", "chunked-prefill", "Tokens through the model each second.", h("canvas", { id: "throughput", role: "img" }), legend([["line said", "generated"], ["line prompt", "prompt"]])),
      panel("Where a step's time goes", "one-step", "The latest steps, part by part.", h("canvas", { id: "step-times", role: "img" }), legend([["part forward", "model"], ["part sample", "sampling"], ["part host", "the rest"]])),
      panel("Latency", "latency", "One dot a finished request: seconds to its first token, and between tokens.", h("canvas", { id: "latency", role: "img" }), legend([["dot first", "first token"], ["dot per", "per token"]])),
    ),
  ];
}

function panel(title, section, text, ...content) {
  const learn = section && h("button", { type: "button", class: "learn", "aria-label": `More about: ${title}`, onclick: () => document.dispatchEvent(new CustomEvent("learn", { detail: section })) }, "Learn more");
  const tools = content.filter((node) => node.tagName === "BUTTON");
  const head = h("div", { class: "row" }, h("h2", {}, title), h("span", { class: "spacer" }), tools);
  return h("section", { class: "panel", "aria-label": title }, head, text && h("p", { class: "hint" }, text, " ", learn), content.filter((node) => node.tagName !== "BUTTON"));
}

function legend(entries) {
  return h("div", { class: "legend" }, entries.map(([kind, text]) => h("span", {}, h("i", { class: kind }), text)));
}

function drawTiles() {
  const { pool, counters, engine } = state;
  const rate = history.rates(state.now);
  const share = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "–");
  const steps = history.steps.slice(-40);
  const mean = steps.length ? steps.reduce((sum, step) => sum + step.total, 0) / steps.length : 0;
  const first = median(history.ended.map((end) => end.first_token_us).filter((us) => us !== null));
  const tiles = [
    ["Running", number(state.num_running), `of at most ${number(engine.max_num_seqs)}`],
    ["Waiting", number(state.num_waiting), state.num_waiting ? "for a seat or for blocks" : "nobody"],
    ["Generated", `${number(rate.said)}/s`, "tokens, last 2 s"],
    ["Prompt", `${number(rate.prompt)}/s`, "tokens, last 2 s"],
    ["A step", mean ? duration(mean) : "–", `${number(counters.steps)} so far`],
    ["KV in use", share(pool.used, pool.blocks), `${bytes(pool.used * engine.block_bytes)} of ${bytes(pool.blocks * engine.block_bytes)}`],
    ["Prefix hits", share(counters.prefix_hits, counters.prefix_queries), `${number(counters.prefix_hits)} tokens saved`],
  ];
  if (counters.draft_tokens !== undefined) {
    const length = counters.drafts ? (1 + counters.accepted_tokens / counters.drafts).toFixed(1) : "–";
    tiles.push(["Drafts kept", share(counters.accepted_tokens, counters.draft_tokens), `${number(counters.accepted_tokens)} of ${number(counters.draft_tokens)}`]);
    tiles.push(["Tokens a draft step", length, `${counters.drafts_gained_us < 0 ? "lost" : "saved"} ${duration(Math.abs(counters.drafts_gained_us))}`]);
  } else tiles.push(["First token", first ? duration(first) : "–", "median so far"]);
  if (counters.preemptions) tiles.push(["Preempted", number(counters.preemptions), "gave blocks back"]);
  const box = $("tiles");
  while (box.children.length < tiles.length) box.append(h("div", { class: "tile" }, h("span"), h("strong"), h("small")));
  while (box.children.length > tiles.length) box.lastChild.remove();
  tiles.forEach((texts, place) => texts.forEach((text, part) => setText(box.children[place].children[part], text)));
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
