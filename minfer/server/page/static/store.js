// What is kept in this browser: conversations, sampling parameters, how the page looks. Nothing of it is sent anywhere by itself.

const KEY = "minfer.page.1";
const EMPTY = { conversations: [], current: null, sampling: { values: { temperature: 0.7 } }, view: null, theme: null, sidebar: true };

function load() {
  try {
    const saved = JSON.parse(localStorage.getItem(KEY) ?? "{}");
    return { ...EMPTY, ...saved, conversations: Array.isArray(saved.conversations) ? saved.conversations : [] };
  } catch {
    return { ...EMPTY };
  }
}

export const state = load();
const deleted = new Set();
let complain = () => {};

/** `tell(message)` is called when something could not be saved. */
export function onSaveError(tell) {
  complain = tell;
}

/** Other tabs write here too: of each conversation the newer version stays, and what was deleted here is gone. */
function merge() {
  const byId = new Map(state.conversations.map((conversation) => [conversation.id, conversation]));
  for (const other of load().conversations) {
    const mine = byId.get(other.id);
    if (mine === undefined && !deleted.has(other.id)) byId.set(other.id, other);
    else if (mine && other.updated > mine.updated) Object.assign(mine, other);
  }
  state.conversations = [...byId.values()].sort((a, b) => b.updated - a.updated);
}

export function save() {
  try {
    merge();
    localStorage.setItem(KEY, JSON.stringify(state));
  } catch {
    complain("This browser has no room for more conversations: delete some, or what you write now is lost when the page closes.");
  }
}

export function currentConversation() {
  return state.conversations.find((conversation) => conversation.id === state.current) ?? newConversation();
}

/** An empty one; if the newest is empty still, that. */
export function newConversation() {
  let conversation = state.conversations[0];
  if (!conversation || conversation.messages.length) {
    conversation = { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), title: "", system: "", messages: [], updated: Date.now() };
    state.conversations.unshift(conversation);
  }
  state.current = conversation.id;
  return conversation;
}

export function deleteConversation(id) {
  deleted.add(id);
  state.conversations = state.conversations.filter((conversation) => conversation.id !== id);
  if (state.current === id) state.current = state.conversations[0]?.id ?? newConversation().id;
  save();
}

export function touch(conversation) {
  conversation.updated = Date.now();
  const first = conversation.messages.find((message) => message.role === "user");
  conversation.title = first ? first.content.trim().replace(/\s+/g, " ").slice(0, 60) : "";
  save();
}
