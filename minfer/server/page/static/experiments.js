// Buttons that give the engine something to do, each to show one technique. All of them are ordinary requests.
//
// A browser opens six connections to a server, and the chat and the live view need some, so many requests travel as one
// with a list of prompts: the engine runs each of them by itself.

import { h } from "./dom.js";
import { request } from "./api.js";

const SENTENCE = "The engine reads every token once, keeps what it computed in blocks, and looks it up again when the next token comes. ";
const TOPICS = ["rivers", "clocks", "bridges", "birds", "paper", "salt", "maps", "bread", "glass", "wind", "ships", "stars"];
const about = (topic) => `Write about ${topic}, from the beginning: `;

/** As many sentences as make about so many tokens, and leave room for an answer. */
function sentences(tokens, { engine, sentence_tokens }) {
  return SENTENCE.repeat(Math.max(1, Math.floor(Math.min(tokens, engine.max_model_len - 180) / sentence_tokens)));
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

const EXPERIMENTS = [
  ["One request", "Watch the bar (its prompt), then one dot a step. Most of each step's budget stays unused.", (run) => run([about("rivers")], 90)],
  [
    "Eight at once",
    "Continuous batching: they join at different steps and share them, and a step with eight tokens takes hardly longer than one with one.",
    async (run) => {
      const first = run(TOPICS.slice(0, 3).map(about), 120);
      await pause(350);
      const second = run(TOPICS.slice(3, 6).map(about), 50);
      await pause(350);
      await Promise.all([first, second, run(TOPICS.slice(6, 8).map(about), 90)]);
    },
  ],
  [
    "A long prompt",
    "Chunked prefill: the long prompt comes in pieces, and those who are writing still get their token in each step.",
    async (run, facts) => {
      const writing = run(TOPICS.slice(0, 3).map(about), 160);
      await pause(400);
      const chunk = Math.min(facts.engine.max_prefill_chunk, facts.engine.max_num_batched_tokens);
      await Promise.all([writing, run([`${Date.now()}. ${sentences(3.5 * chunk, facts)}`], 24)]);
    },
  ],
  [
    "A shared beginning",
    "Prefix sharing: the first one computes a long beginning, the next five find it in the cache and read the same blocks.",
    async (run, facts) => {
      const beginning = `Rules of ${Date.now()}. ${sentences(260, facts)}`;
      const first = run([`${beginning} ${about("salt")}`], 140);
      await first.begun;
      await Promise.all([first, run(TOPICS.slice(0, 5).map((topic) => `${beginning} ${about(topic)}`), 100)]);
    },
  ],
  ["One prompt, four answers", "n=4: four requests fork from one prompt. They share its full blocks and get a copy of the one it ends in.", (run, facts) => run([sentences(110, facts)], 80, { n: 4, temperature: 1 })],
  [
    "More than fits",
    "The queue: more requests than seats. Whoever is done makes room for the next in line, in the very next step.",
    (run, { engine }) => run(Array.from({ length: Math.min(120, engine.max_num_seqs + 16) }, (_, place) => `${place}. ${about(TOPICS[place % TOPICS.length])}`), 40),
  ],
];

let controller = null;

export function startExperiments(box) {
  const says = h("p", { class: "hint", role: "status" }, "Each button sends requests that show one technique.");
  const end = h("button", { type: "button", class: "button small danger", hidden: true, onclick: () => controller?.abort() }, "Stop them");
  const buttons = EXPERIMENTS.map(([name, text, work]) => h("button", { type: "button", class: "button small", onclick: () => start(text, work, says, end) }, name));
  box.append(h("div", { class: "row wrap" }, buttons, end), says);
}

async function start(text, work, says, end) {
  controller?.abort();
  const own = (controller = new AbortController());
  says.textContent = text;
  says.classList.remove("error");
  end.hidden = false;
  try {
    const { engine } = await (await request("/v1/engine/state", { signal: own.signal })).json();
    const { count } = await (await request("/tokenize", { body: { prompt: SENTENCE, add_special_tokens: false }, signal: own.signal })).json();
    await work((prompts, tokens, more) => complete(prompts, tokens, own.signal, more), { engine, sentence_tokens: count });
  } catch (error) {
    own.abort(); // the rest of this experiment
    if (error.name !== "AbortError") {
      says.textContent = error.message;
      says.classList.add("error");
    }
  }
  if (controller === own) end.hidden = true;
}

/** Runs the prompts to their end. `begun` resolves with the first token. */
function complete(prompts, tokens, signal, { n = 1, temperature = 0.8 } = {}) {
  const body = { prompt: prompts, max_tokens: tokens, n, temperature, ignore_eos: true, stream: true };
  let begin;
  const begun = new Promise((resolve) => (begin = resolve));
  const work = (async () => {
    try {
      const reader = (await request("/v1/completions", { body, signal })).body.getReader();
      for (let part = await reader.read(); !part.done; part = await reader.read()) begin();
    } finally {
      begin();
    }
  })();
  return Object.assign(work, { begun });
}
