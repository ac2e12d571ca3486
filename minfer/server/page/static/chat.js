// The chat: messages, streaming, stop, regenerate, edit; and what each reply took.

import { $, copyButton, h, iconButton, number } from "./dom.js";
import { ApiError, events, request } from "./api.js";
import { MarkdownView } from "./markdown.js";
import { samplingBody } from "./settings.js";
import { currentConversation, deleteConversation, newConversation, save, state, touch } from "./store.js";

let running = null; // { controller, message } while a reply comes in
let served = { id: "", max_model_len: 0 };

const list = $("messages");
const composer = $("composer");

export function startChat(model) {
  served = model;
  $("composer-form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  composer.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  composer.addEventListener("input", grow);
  $("stop").addEventListener("click", stop);
  $("new-chat").addEventListener("click", () => open(newConversation()));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) stop();
  });
  open(currentConversation());
}

function grow() {
  composer.style.height = "auto";
  composer.style.height = `${Math.min(composer.scrollHeight, 240)}px`;
}

function open(conversation) {
  stop();
  state.current = conversation.id;
  save();
  drawSidebar();
  drawMessages();
  document.dispatchEvent(new CustomEvent("conversation"));
  composer.focus();
}

function drawSidebar() {
  const items = state.conversations.map((conversation) => {
    const title = conversation.title || "New chat";
    const current = conversation.id === state.current;
    const pick = h("button", { class: "pick", "aria-current": current ? "true" : null, onclick: () => open(conversation), title }, title);
    const remove = iconButton("trash", `Delete the conversation “${title}”`, () => {
      if (current) stop();
      deleteConversation(conversation.id);
      current ? open(currentConversation()) : drawSidebar();
    });
    return h("li", {}, pick, remove);
  });
  $("conversations").replaceChildren(...items);
}

function drawMessages() {
  const { messages } = currentConversation();
  list.replaceChildren(...messages.map((message, place) => drawMessage(message, place)));
  if (!messages.length) list.append(welcome());
  scrollToEnd(true);
}

function welcome() {
  const ideas = ["Explain paged attention to a child.", "Write a haiku about caches.", "List three uses of a paper clip as JSON.", "Write binary search in Python."];
  const pick = (idea) => h("button", { class: "idea", onclick: () => ask(idea) }, idea);
  return h("div", { class: "welcome" }, h("h1", {}, "What do you want to know?"), h("p", {}, `${served.id} runs on this server and nowhere else.`), h("div", { class: "ideas" }, ideas.map(pick)));
}

function drawMessage(message, place) {
  const body = h("div", { class: "body prose" });
  const article = h("article", { class: `message ${message.role}`, "aria-label": message.role === "user" ? "You" : "Model" }, body);
  const view = message.role === "assistant" ? new MarkdownView(body) : null;
  if (view) view.update(message.content);
  else body.append(message.content);
  const foot = h("div", { class: "foot" });
  article.append(foot);
  drawFoot(foot, message, place, article);
  return Object.assign(article, { update: () => view.update(message.content), finish: () => drawFoot(foot, message, place, article) });
}

function drawFoot(foot, message, place, article) {
  const busy = running?.message === message;
  const parts = [h("span", { class: "stats" }, statsLine(message, busy))];
  if (message.error) parts.unshift(h("p", { class: "error", role: "alert" }, message.error));
  if (!busy) {
    const actions = h("span", { class: "actions" }, copyButton(() => message.content, "Copy the message"), iconButton("edit", "Edit the message", () => edit(place, article)));
    if (message.role === "assistant") {
      actions.append(iconButton("again", "Generate this reply again", () => regenerate(place)));
      const last = place === currentConversation().messages.length - 1;
      if (last && message.content && ["length", "stopped"].includes(message.stats?.finish)) {
        actions.append(iconButton("more", "Let the reply go on", () => resume(place)));
      }
    }
    parts.push(actions);
  }
  foot.replaceChildren(...parts);
}

const FINISH = { length: "cut off at the token limit", stopped: "stopped by you" };

function statsLine({ stats, role }, busy) {
  if (role !== "assistant" || !stats) return busy ? "waiting for the first token…" : "";
  const parts = [];
  if (stats.first !== undefined) parts.push(`first token ${stats.first < 1000 ? `${Math.round(stats.first)} ms` : `${(stats.first / 1000).toFixed(1)} s`}`);
  if (stats.rate) parts.push(`${stats.rate < 10 ? stats.rate.toFixed(1) : number(stats.rate)} tokens/s`);
  if (stats.tokens) parts.push(`${number(stats.tokens)} tokens`);
  if (stats.prompt) parts.push(`prompt ${number(stats.prompt)}${stats.cached ? `, ${number(stats.cached)} of it from the cache` : ""}`);
  if (FINISH[stats.finish]) parts.push(FINISH[stats.finish]);
  return parts.join(" · ");
}

function send() {
  const text = composer.value.trim();
  if (!text || running) return;
  composer.value = "";
  grow();
  ask(text);
}

function ask(text) {
  if (running) return;
  const conversation = currentConversation();
  conversation.messages.push({ role: "user", content: text });
  reply(conversation);
}

function regenerate(place) {
  if (running) stop();
  const conversation = currentConversation();
  conversation.messages.splice(place);
  reply(conversation);
}

/** Goes on with a reply that ended early: its text is the prompt's last part. */
function resume(place) {
  const conversation = currentConversation();
  const message = conversation.messages[place];
  reply(conversation, message);
}

function edit(place, article) {
  if (running) stop();
  const conversation = currentConversation();
  const message = conversation.messages[place];
  const resend = message.role === "user";
  const area = h("textarea", { "aria-label": "Edit the message" });
  area.value = message.content;
  const close = () => drawMessages();
  const accept = () => {
    const text = area.value.trim();
    if (!text) return;
    message.content = text;
    if (!resend) {
      touch(conversation);
      close();
      return;
    }
    conversation.messages.splice(place + 1);
    reply(conversation);
  };
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      accept();
    }
  });
  const buttons = h("div", { class: "row" }, h("span", { class: "hint" }, resend ? "What follows is written anew." : "Only what is kept changes."), h("span", { class: "spacer" }),
    h("button", { type: "button", class: "button", onclick: close }, "Cancel"), h("button", { type: "button", class: "button primary", onclick: accept }, resend ? "Send" : "Save"));
  article.replaceChildren(h("div", { class: "editor" }, area, buttons));
  area.style.height = `${Math.min(area.scrollHeight + 4, 400)}px`;
  area.focus();
}

export function stop() {
  running?.controller.abort();
}

/** Streams a reply to what the conversation holds; with `partial`, more of that message. */
async function reply(conversation, partial = null) {
  const message = partial ?? { role: "assistant", content: "" };
  if (!partial) conversation.messages.push(message);
  delete message.error;
  const own = (running = { controller: new AbortController(), message });
  touch(conversation);
  drawSidebar();
  drawMessages();
  setBusy(true);
  const article = list.lastElementChild;
  const sent = performance.now();
  const before = message.content;
  message.stats = null;
  let frame = 0;
  const show = () => {
    frame = 0;
    if (!article.isConnected) return;
    article.update();
    article.finish();
    scrollToEnd();
  };
  try {
    const response = await request("/v1/chat/completions", { body: requestBody(conversation, message, Boolean(partial)), signal: own.controller.signal });
    for await (const event of events(response)) {
      take(event, message, sent);
      frame ||= requestAnimationFrame(show);
    }
  } catch (error) {
    if (error.name === "AbortError") message.stats = { ...message.stats, finish: "stopped" };
    else message.error = explain(error);
    if (error.status === 401) document.dispatchEvent(new CustomEvent("key-needed", { detail: error.message }));
  }
  cancelAnimationFrame(frame);
  touch(conversation);
  if (running !== own) return; // another reply has taken its place
  running = null;
  setBusy(false);
  if (article.isConnected) drawMessages();
  announce(message, before);
}

function requestBody(conversation, message, continues) {
  const end = conversation.messages.indexOf(message);
  const history = conversation.messages.slice(0, continues ? end + 1 : end).filter((m) => m.role === "user" || m.content);
  const messages = history.map(({ role, content }) => ({ role, content }));
  if (conversation.system.trim()) messages.unshift({ role: "system", content: conversation.system.trim() });
  const more = continues ? { continue_final_message: true, add_generation_prompt: false } : {};
  return { model: served.id, messages, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true }, ...samplingBody(), ...more };
}

function take(event, message, sent) {
  const now = performance.now();
  const stats = (message.stats ??= {});
  const choice = event.choices[0];
  if (choice) {
    stats.first ??= now - sent;
    stats.begun ??= now;
    stats.latest = now;
    message.content += choice.delta.content ?? "";
    if (choice.finish_reason) stats.finish = choice.finish_reason;
  }
  if (event.usage) {
    stats.tokens = event.usage.completion_tokens;
    stats.prompt = event.usage.prompt_tokens;
    stats.cached = event.usage.prompt_tokens_details?.cached_tokens ?? 0;
    if (stats.tokens > 1 && stats.latest > stats.begun) stats.rate = ((stats.tokens - 1) / (stats.latest - stats.begun)) * 1000;
  }
}

/** The server's sentence, and what to do where it can't know. */
function explain(error) {
  if (!(error instanceof ApiError)) return `The page failed on the reply: ${error.message}`;
  if (error.status === 429) return `The server is full: ${error.message}`;
  return error.message;
}

function announce(message, before) {
  const text = message.error ?? `Reply finished: ${message.content.slice(before.length, before.length + 300)}`;
  $("announce").textContent = text;
}

function setBusy(busy) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  list.setAttribute("aria-busy", String(busy));
}

/** Keeps the end in view while it grows, unless the reader has scrolled away from it. */
function scrollToEnd(always = false) {
  const box = $("scroll");
  if (always || box.scrollHeight - box.scrollTop - box.clientHeight < 120) box.scrollTop = box.scrollHeight;
}
