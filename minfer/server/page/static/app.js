// Starts the page: theme, view, key, waiting for a server that still loads; then the chat and the live view.

import { $, drawIcons } from "./dom.js";
import { hasKey, request, setKey } from "./api.js";
import { startChat } from "./chat.js";
import { startEngineView } from "./engine.js";
import { renderMarkdown } from "./markdown.js";
import { startSettings } from "./settings.js";
import { onSaveError, save, state } from "./store.js";

const RETRY_MS = 1000;
const narrow = matchMedia("(max-width: 860px)");
const dark = matchMedia("(prefers-color-scheme: dark)");

drawIcons();
startTheme();
startViews();
startKey();
startLearn();
onSaveError(notice);
connect();

/** Asks for the model until there is one; asks for the key if the server wants it. */
async function connect() {
  for (;;) {
    try {
      const [model] = (await (await request("/v1/models")).json()).data;
      notice(null);
      $("model").textContent = model.id;
      $("model").title = `${model.id}: ${model.max_model_len} tokens of context`;
      document.title = `${model.id} · minfer`;
      $("open-key").hidden = !hasKey();
      startSettings();
      startChat(model);
      startEngineView();
      return;
    } catch (error) {
      if (error.status === 401) await askForKey(hasKey() ? error.message : null);
      else notice(error.message);
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

function notice(text) {
  $("notice").hidden = text === null;
  $("notice").textContent = text ?? "";
}

function startTheme() {
  const apply = () => {
    document.documentElement.dataset.theme = state.theme ?? (dark.matches ? "dark" : "light");
    document.dispatchEvent(new CustomEvent("theme"));
  };
  $("toggle-theme").addEventListener("click", () => {
    const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    state.theme = next === (dark.matches ? "dark" : "light") ? null : next; // the system's choice is no choice
    save();
    apply();
  });
  dark.addEventListener("change", apply);
  apply();
}

function startViews() {
  const sidebar = (open) => {
    document.body.classList.toggle("sidebar-open", open);
    $("toggle-sidebar").setAttribute("aria-expanded", String(open));
  };
  const show = () => {
    const view = state.view === "split" && narrow.matches ? "chat" : (state.view ?? "chat");
    document.body.dataset.view = view;
    for (const button of $("view-switch").children) button.setAttribute("aria-pressed", String(button.dataset.view === view));
    sidebar(view === "chat" && !narrow.matches && state.sidebar); // beside the live view there is no room for it
    document.dispatchEvent(new CustomEvent("view"));
  };
  for (const button of $("view-switch").children) {
    button.addEventListener("click", () => {
      state.view = button.dataset.view;
      save();
      show();
    });
  }
  $("toggle-sidebar").addEventListener("click", () => {
    const open = !document.body.classList.contains("sidebar-open");
    sidebar(open);
    if (document.body.dataset.view === "chat" && !narrow.matches) {
      state.sidebar = open;
      save();
    }
  });
  document.addEventListener("conversation", () => narrow.matches && sidebar(false));
  narrow.addEventListener("change", show);
  show();
}

function startKey() {
  $("open-key").addEventListener("click", () => askForKey(null));
  document.addEventListener("key-needed", (event) => askForKey(event.detail));
  $("key-cancel").addEventListener("click", () => $("key-dialog").close());
  $("key-form").addEventListener("submit", () => {
    setKey($("key-input").value.trim(), $("key-remember").checked);
    $("open-key").hidden = !hasKey();
  });
}

/** Resolves when the dialog is closed, with or without a key. */
function askForKey(message) {
  const dialog = $("key-dialog");
  if (!dialog.open) dialog.showModal();
  $("key-error").hidden = !message;
  $("key-error").textContent = message ?? "";
  return new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
}

function startLearn() {
  const dialog = $("learn");
  const open = async (section) => {
    const text = $("learn-text");
    if (!text.childNodes.length) {
      text.append(renderMarkdown(await (await request("/static/learn.md")).text()));
      for (const heading of text.querySelectorAll("h3, h4")) heading.id = `learn-${heading.textContent.toLowerCase().replaceAll(" ", "-")}`;
    }
    if (!dialog.open) dialog.showModal();
    const target = section && document.getElementById(`learn-${section}`);
    if (target) target.scrollIntoView({ block: "start" });
    else dialog.scrollTop = 0;
  };
  $("open-learn").addEventListener("click", () => open(null));
  document.addEventListener("learn", (event) => open(event.detail));
  $("close-learn").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
}
