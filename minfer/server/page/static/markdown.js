// Markdown to elements: headings, lists, tables, quotes, code, links, emphasis. Made for text that nobody vouches for:
//   - raw HTML is text like any other
//   - links go to http, https and mailto only, and take no referrer and no opener along
//   - images are not loaded: a model that was talked into writing ![](https://elsewhere/?what-you-said) would be telling it
//   - spans and nesting have limits, so that no input is slow
// It leaves out reference links, footnotes, setext headings and HTML blocks.

import { copyButton, h } from "./dom.js";
import { highlight } from "./highlight.js";

const DEEPEST = 12;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)(.*)$/;
const QUOTE = /^ {0,3}>\s?(.*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-{1,}:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;

/** A text that grows: only the blocks that changed are drawn again. */
export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.blocks = [];
  }

  update(source) {
    const blocks = splitBlocks(source.split("\n"));
    const keys = blocks.map((block) => block.join("\n"));
    let same = 0;
    while (same < keys.length && keys[same] === this.blocks[same]) same++;
    while (this.element.childNodes.length > same) this.element.lastChild.remove();
    for (const block of blocks.slice(same)) this.element.append(drawBlock(block, 0));
    this.blocks = keys;
  }
}

export function renderMarkdown(source) {
  const fragment = document.createDocumentFragment();
  fragment.append(...drawBlocks(source.split("\n"), 0));
  return fragment;
}

function drawBlocks(lines, depth) {
  return splitBlocks(lines).map((block) => drawBlock(block, depth));
}

/** Lines -> groups of lines, each one block. Blank lines between blocks are dropped. */
function splitBlocks(lines) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const end = endOfBlock(lines, at);
    blocks.push(lines.slice(at, end));
    at = end;
  }
  return blocks;
}

function endOfBlock(lines, at) {
  const fence = FENCE.exec(lines[at]);
  if (fence) return endOfFence(lines, at, fence[1]);
  if (HEADING.test(lines[at]) || RULE.test(lines[at])) return at + 1;
  if (QUOTE.test(lines[at])) return endWhile(lines, at, (line) => QUOTE.test(line) || (line.trim() && !startsBlock(line)));
  if (ITEM.test(lines[at])) return endOfList(lines, at);
  if (isTable(lines, at)) return endWhile(lines, at + 1, (line) => line.includes("|") && line.trim());
  return endWhile(lines, at, (line, index) => line.trim() && !startsBlock(line) && !isTable(lines, index));
}

function endWhile(lines, at, goesOn) {
  let end = at + 1;
  while (end < lines.length && goesOn(lines[end], end)) end++;
  return end;
}

function endOfFence(lines, at, fence) {
  const close = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}\\s*$`);
  let end = at + 1;
  while (end < lines.length && !close.test(lines[end])) end++;
  return Math.min(end + 1, lines.length);
}

/** Until a line that is neither an item, nor indented, nor the paragraph of the item going on. */
function endOfList(lines, at) {
  const indent = ITEM.exec(lines[at])[1].length;
  let end = at + 1;
  for (; end < lines.length; end++) {
    const line = lines[end];
    if (!line.trim()) {
      const next = lines.slice(end + 1).find((later) => later.trim());
      const goesOn = next !== undefined && (ITEM.test(next) || indentOf(next) > indent);
      if (!goesOn) return end;
    } else if (!ITEM.test(line) && indentOf(line) <= indent && (startsBlock(line) || !lines[end - 1].trim())) {
      return end;
    }
  }
  return end;
}

const indentOf = (line) => line.length - line.trimStart().length;
const startsBlock = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);
const isTable = (lines, at) => lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && TABLE_RULE.test(lines[at + 1]);

function drawBlock(lines, depth) {
  const first = lines[0];
  const fence = FENCE.exec(first);
  if (fence) return drawCode(lines, fence);
  const heading = HEADING.exec(first);
  if (heading) return h(`h${Math.min(6, heading[1].length + 1)}`, {}, inline(heading[2]));
  if (RULE.test(first)) return h("hr");
  if (depth < DEEPEST && QUOTE.test(first)) {
    return h("blockquote", {}, drawBlocks(lines.map((line) => QUOTE.exec(line)?.[1] ?? line), depth + 1));
  }
  if (depth < DEEPEST && ITEM.test(first)) return drawList(lines, depth);
  if (isTable(lines, 0)) return drawTable(lines);
  return h("p", {}, inline(lines.map((line) => line.trimStart()).join("\n")));
}

function drawCode(lines, [, fence, info]) {
  const closed = lines.length > 1 && lines.at(-1).trim().startsWith(fence) && !lines.at(-1).trim().replaceAll(fence[0], "");
  const code = lines.slice(1, closed ? -1 : undefined).join("\n");
  const language = info.trim().split(/\s+/)[0].toLowerCase();
  const head = h("div", { class: "code-head" }, h("span", {}, language || "text"), copyButton(() => code, "Copy code"));
  return h("div", { class: "code" }, head, h("pre", { tabindex: "0" }, h("code", {}, highlight(code, language))));
}

function drawList(lines, depth) {
  const [, , marker] = ITEM.exec(lines[0]);
  const ordered = /\d/.test(marker);
  const items = [];
  const indent = indentOf(lines[0]);
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (match && match[1].length <= indent + 1) {
      items.push({ width: match[1].length + match[2].length + Math.min(4, match[3].length || 1), lines: [match[4]] });
    } else {
      const item = items.at(-1);
      item.lines.push(line.slice(Math.min(item.width, indentOf(line))));
    }
  }
  const loose = lines.some((line) => !line.trim());
  const list = h(ordered ? "ol" : "ul", ordered && parseInt(marker, 10) !== 1 ? { start: parseInt(marker, 10) } : {});
  list.append(...items.map((item) => drawItem(item.lines, loose, depth)));
  return list;
}

function drawItem(lines, loose, depth) {
  const task = /^\[([ xX])\]\s+/.exec(lines[0]);
  if (task) lines = [lines[0].slice(task[0].length), ...lines.slice(1)];
  const nodes = drawBlocks(lines, depth + 1);
  const tight = loose ? nodes : nodes.flatMap((node) => (node.tagName === "P" ? [...node.childNodes] : [node]));
  const box = task ? h("input", { type: "checkbox", disabled: true, checked: task[1] !== " " }) : null;
  return h("li", task ? { class: "task" } : {}, box, tight);
}

function drawTable(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  const sides = cells(lines[1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : null));
  const row = (line, tag) => h("tr", {}, sides.map((side, place) => h(tag, { class: side }, inline(cells(line)[place] ?? ""))));
  const body = lines.slice(2).map((line) => row(line, "td"));
  return h("div", { class: "table" }, h("table", {}, h("thead", {}, row(lines[0], "th")), h("tbody", {}, body)));
}

// Spans: [what starts one, what becomes of it]. Tried in order at each place; a span has at most 2,000 characters.
const URL_PART = String.raw`(?:[^\s()<>]|\([^\s()<>]*\))*`;
const TITLE = String.raw`(?:\s+(?:"[^"]{0,300}"|'[^']{0,300}'))?`;
const RULES = [
  [/\\([!-/:-@[-`{-~])/y, (m) => m[1]],
  [/(`+)([^]{0,1999}?[^`])\1(?!`)/y, (m) => h("code", {}, m[2].replace(/^ (.*\S.*) $/s, "$1").replaceAll("\n", " "))],
  [new RegExp(String.raw`!\[([^\]]{0,500})\]\(\s*(${URL_PART})${TITLE}\s*\)`, "y"), (m) => link(m[2], [`image: ${m[1] || m[2]}`])],
  [new RegExp(String.raw`\[((?:[^\[\]]|\[[^\[\]]{0,500}\]){0,1000}?)\]\(\s*(${URL_PART})${TITLE}\s*\)`, "y"), (m, depth) => link(m[2], inline(m[1], depth + 1))],
  [/<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y, (m) => link(m[1], [m[1]])],
  [/https?:\/\/[^\s<>"'`]{0,1999}[^\s<>"'`.,;:!?)\]*_~]/y, (m) => link(m[0], [m[0]])],
  [/\*\*(?=\S)([^]{0,1999}?\S)\*\*(?!\*)/y, (m, depth) => h("strong", {}, inline(m[1], depth + 1))],
  [/(?<!\w)__(?=\S)([^]{0,1999}?\S)__(?!\w)/y, (m, depth) => h("strong", {}, inline(m[1], depth + 1))],
  [/\*(?=[^\s*])([^]{0,1999}?[^\s*])\*(?!\*)/y, (m, depth) => h("em", {}, inline(m[1], depth + 1))],
  [/(?<!\w)_(?=[^\s_])([^]{0,1999}?[^\s_])_(?!\w)/y, (m, depth) => h("em", {}, inline(m[1], depth + 1))],
  [/~~(?=\S)([^]{0,1999}?\S)~~/y, (m, depth) => h("del", {}, inline(m[1], depth + 1))],
  [/ *\\?\n/y, () => h("br")],
];
const PLAIN = /[^\\`![<*_~\nh]+/y;

/** The text of one block as nodes. */
export function inline(text, depth = 0) {
  const nodes = [];
  let plain = "";
  let at = 0;
  while (at < text.length) {
    PLAIN.lastIndex = at;
    const run = PLAIN.exec(text);
    if (run) {
      plain += run[0];
      at = PLAIN.lastIndex;
      continue;
    }
    const found = depth < DEEPEST ? spanAt(text, at, depth) : null;
    if (found && typeof found.node !== "string") {
      nodes.push(plain, found.node);
      plain = "";
    } else {
      plain += found ? found.node : text[at];
    }
    at = found ? found.end : at + 1;
  }
  return [...nodes, plain].filter((node) => node !== "");
}

function spanAt(text, at, depth) {
  for (const [rule, draw] of RULES) {
    rule.lastIndex = at;
    const match = rule.exec(text);
    if (match) {
      const end = rule.lastIndex; // before `draw`, which may use the rule again
      return { node: draw(match, depth), end };
    }
  }
  return null;
}

/** Only where following it is harmless; else its text stays, and its address beside it. */
function link(address, children) {
  let url = null;
  try {
    url = new URL(address);
  } catch {
    // relative, or no address at all
  }
  if (!url || !["http:", "https:", "mailto:"].includes(url.protocol)) return h("span", {}, children, address ? ` (${address})` : "");
  return h("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow", title: url.href }, children);
}
