// Elements made by hand. Text goes in as text, so nothing that a user or a model wrote can become markup; the page's
// policy (see assets.py) forbids innerHTML altogether.

export const $ = (id) => document.getElementById(id);

/** h("button", { class: "x", onclick: f, hidden: true }, "text", node): attributes that are null or false are left out. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const ICONS = {
  menu: "M3 6h18M3 12h18M3 18h18",
  plus: "M12 5v14M5 12h14",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  check: "M5 12.5l5 5 9-11",
  edit: "M4 20h4L19 9l-4-4L4 16zM13.5 6.5l4 4",
  again: "M20 11a8 8 0 1 0-2.3 6.3M20 5v6h-6",
  trash: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13",
  sliders: "M4 7h9M17 7h3M15 5v4M4 17h3M11 17h9M9 15v4",
  key: "M14 10a4 4 0 1 0-3.5 4L12 15.5V18h2.5v2H18v-3l-4.5-4.5A4 4 0 0 0 14 10zM9 9h.01",
  book: "M4 5c3-1 6-1 8 1 2-2 5-2 8-1v14c-3-1-6-1-8 1-2-2-5-2-8-1zM12 6v14",
  theme: "M12 3a9 9 0 1 0 0 18zM12 3a9 9 0 0 1 0 18",
  close: "M6 6l12 12M18 6L6 18",
  pause: "M8 5v14M16 5v14",
  play: "M8 5l11 7-11 7z",
  more: "M5 12h14M13 6l6 6-6 6",
};

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** Puts its icon before the text of every element that names one. */
export function drawIcons(root = document) {
  for (const element of root.querySelectorAll("[data-icon]")) {
    element.querySelector(".icon")?.remove();
    element.prepend(icon(element.dataset.icon));
  }
}

export function iconButton(name, label, onclick) {
  return h("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick }, icon(name));
}

/** Copies, and shows for a moment that it did. */
export function copyButton(text, label = "Copy") {
  const button = iconButton("copy", label, async () => {
    let done = "check";
    try {
      await navigator.clipboard.writeText(text());
    } catch {
      done = "close"; // not a secure context, or not allowed
    }
    button.replaceChildren(icon(done));
    setTimeout(() => button.replaceChildren(icon("copy")), 1200);
  });
  return button;
}

let tip = null;

/** Shows lines of text beside the pointer; null hides them. */
export function tooltip(lines, event) {
  tip ??= $("tooltip");
  tip.hidden = lines === null;
  if (lines === null) return;
  tip.replaceChildren(...lines.map((line) => h("div", {}, line)));
  const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  const below = event.clientY + 16;
  const y = below + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : below;
  tip.style.transform = `translate(${Math.max(4, x)}px, ${Math.max(4, y)}px)`;
}

/** A canvas's context in CSS pixels, cleared, sharp on dense screens. Height 0 keeps the one it has. */
export function context2d(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

/** The style sheet's own colours, for canvases. */
export function theme() {
  const style = getComputedStyle(document.documentElement);
  const names = ["ink", "soft", "faint", "line", "card", "paper", "accent", "warn", "cached"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

export const number = (value) => Math.round(value).toLocaleString("en");

/** Microseconds for people: 0.42 ms, 12 ms, 1.3 s. */
export function duration(us) {
  if (us < 9950) return `${(us / 1000).toFixed(us < 995 ? 2 : 1)} ms`;
  return us < 995e3 ? `${Math.round(us / 1000)} ms` : `${(us / 1e6).toFixed(us < 9.95e6 ? 2 : 1)} s`;
}

export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  for (; count >= 1024 && place < 4; place++) count /= 1024;
  return `${count.toFixed(count < 10 && place ? 1 : 0)} ${units[place]}`;
}
