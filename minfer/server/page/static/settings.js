// The panel of sampling parameters. An empty field is left out of requests, so the server's own default holds.

import { $, h } from "./dom.js";
import { currentConversation, save, state } from "./store.js";

const FIELDS = [
  { name: "temperature", label: "Temperature", range: [0, 2, 0.05], hint: "0 always takes the likeliest token; higher is more varied." },
  { name: "top_p", label: "Top-p", range: [0.01, 1, 0.01], hint: "Only the likeliest tokens that together have this probability." },
  { name: "top_k", label: "Top-k", range: [0, 200, 1], hint: "Only the k likeliest tokens; 0 is all." },
  { name: "min_p", label: "Min-p", range: [0, 1, 0.01], hint: "Only tokens at least this share as likely as the likeliest." },
  { name: "typical_p", label: "Typical-p", range: [0.01, 1, 0.01], hint: "Only tokens about as surprising as expected." },
  { name: "repetition_penalty", label: "Repetition penalty", range: [0.5, 2, 0.05], hint: "Above 1, tokens that stand in the text already are less likely." },
  { name: "presence_penalty", label: "Presence penalty", range: [-2, 2, 0.1], hint: "Taken off every token that the reply has used." },
  { name: "frequency_penalty", label: "Frequency penalty", range: [-2, 2, 0.1], hint: "The same, times how often it was used." },
  { name: "max_tokens", label: "Most tokens", hint: "Empty: as many as the context holds." },
  { name: "min_tokens", label: "Fewest tokens", hint: "No end before this many." },
  { name: "seed", label: "Seed", hint: "The same seed and prompt give the same reply." },
];

const FORMS = {
  "": { label: "Free text" },
  json: { label: "Any JSON object", body: () => ({ response_format: { type: "json_object" } }) },
  schema: {
    label: "JSON that fits a schema",
    example: '{"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name", "age"]}',
    body: (text) => ({ response_format: { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(text) } } }),
  },
  regex: { label: "A regular expression", example: "(yes|no), because [a-z ]{10,60}\\.", body: (text) => ({ structured_outputs: { regex: text } }) },
  choice: { label: "One of several lines", example: "positive\nnegative\nneutral", body: (text) => ({ structured_outputs: { choice: lines(text) } }) },
  grammar: { label: "A grammar (GBNF or Lark)", example: 'root ::= "I like " ("tea" | "coffee") "."', body: (text) => ({ structured_outputs: { grammar: text } }) },
};

const lines = (text) => text.split("\n").filter((line) => line.trim());

/** The fields of a request that the panel sets. Throws where the schema is no JSON. */
export function samplingBody() {
  const { values = {}, stop = "", form = "", formText = {} } = state.sampling;
  const body = {};
  for (const { name } of FIELDS) {
    const value = values[name];
    if (value !== undefined && value !== "") body[name] = Number(value);
  }
  const stops = lines(stop);
  if (stops.length) body.stop = stops;
  return Object.assign(body, FORMS[form]?.body?.(formText[form] ?? FORMS[form].example));
}

export function startSettings() {
  $("toggle-settings").addEventListener("click", toggle);
  document.addEventListener("conversation", draw);
  draw();
}

function toggle() {
  const panel = $("settings");
  panel.hidden = !panel.hidden;
  $("toggle-settings").setAttribute("aria-expanded", String(!panel.hidden));
  if (!panel.hidden) panel.querySelector("textarea, input").focus();
}

function draw() {
  const conversation = currentConversation();
  const system = h("textarea", { rows: "3", placeholder: "You are a helpful assistant.", oninput: (event) => {
    conversation.system = event.target.value;
    save();
  } });
  system.value = conversation.system;
  const stop = h("textarea", { rows: "2", placeholder: "one a line", oninput: (event) => set("stop", event.target.value) });
  stop.value = state.sampling.stop ?? "";
  $("settings").replaceChildren(
    h("div", { class: "row" }, h("h2", {}, "Sampling"), h("span", { class: "spacer" }), h("button", { type: "button", class: "button small", onclick: reset }, "Reset"),
      h("button", { type: "button", class: "button small", onclick: toggle }, "Close")),
    h("label", { class: "field" }, "System prompt (of this conversation)", system),
    ...FIELDS.map(drawField),
    h("label", { class: "field" }, "Stop at", stop),
    ...drawForm(),
    h("p", { class: "hint" }, "Empty fields are the server's defaults. All of this stays in this browser."),
  );
}

function drawField({ name, label, range, hint }) {
  const value = state.sampling.values?.[name] ?? "";
  const [min, max, step] = range ?? [0, null, 1];
  const box = h("input", { type: "number", min, max, step: range ? "any" : step, value, placeholder: "default", "aria-label": label, id: `sampling-${name}` });
  const slider = range ? h("input", { type: "range", min, max, step, "aria-label": `${label}, slider`, tabindex: "-1" }) : null;
  if (slider) slider.value = value === "" ? 1 : value;
  const change = (next) => {
    set("values", { ...state.sampling.values, [name]: next });
    box.value = next;
    if (slider && next !== "") slider.value = next;
  };
  box.addEventListener("input", () => change(box.value));
  slider?.addEventListener("input", () => change(slider.value));
  return h("div", { class: "field", title: hint }, h("label", { for: `sampling-${name}` }, label), h("div", { class: "row" }, slider, box), h("span", { class: "hint" }, hint));
}

function drawForm() {
  const { form = "", formText = {} } = state.sampling;
  const options = Object.entries(FORMS).map(([name, { label }]) => h("option", { value: name, selected: name === form }, label));
  const pick = h("select", { id: "sampling-form", onchange: (event) => {
    set("form", event.target.value);
    draw();
    $("sampling-form").focus();
  } }, options);
  const parts = [h("label", { class: "field" }, "Form of the answer", pick)];
  if (FORMS[form]?.example) {
    const text = h("textarea", { rows: "6", class: "mono", spellcheck: "false", "aria-label": FORMS[form].label, id: "sampling-form-text", oninput: (event) => set("formText", { ...state.sampling.formText, [form]: event.target.value }) });
    text.value = formText[form] ?? FORMS[form].example;
    parts.push(text);
  }
  return parts;
}

function set(name, value) {
  state.sampling[name] = value;
  save();
}

function reset() {
  state.sampling = { values: { temperature: 0.7 } };
  save();
  draw();
}
