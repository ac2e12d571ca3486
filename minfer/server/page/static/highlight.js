// Colours for code: comments, strings, numbers and the keywords that most languages share. Enough to read by; no parser.

const KEYWORDS = new Set(
  ("abstract as assert async await break case catch class const constexpr continue def default defer del delete do elif else end enum " +
    "except export extends extern false False final finally fn for foreach from func function global go goto if impl implements import in " +
    "inline instanceof interface is lambda let loop match mod module mut namespace new nil none None nonlocal not null nullptr of or and " +
    "override package pass private protected pub public raise return select self Self sizeof static struct super switch template then " +
    "this throw throws trait true True try type typedef typename typeof union unless unsafe until use using var virtual void where while " +
    "with yield int float double char bool boolean string str long short unsigned signed auto u8 u16 u32 u64 i8 i16 i32 i64 f32 f64 usize " +
    "SELECT FROM WHERE INSERT INTO VALUES UPDATE SET DELETE CREATE TABLE JOIN LEFT RIGHT INNER OUTER ON GROUP BY ORDER HAVING LIMIT AS AND OR NOT NULL").split(" "),
);
const HASH = new Set("python py sh bash shell zsh ruby rb yaml yml toml r perl dockerfile makefile ini conf elixir julia".split(" "));
const DASHES = new Set("sql lua haskell hs ada vhdl".split(" "));
const PLAIN = new Set(["", "text", "txt", "plain", "plaintext", "output", "console", "markdown", "md"]);
const LONGEST = 20000;

const STRINGS = String.raw`"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)|"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?|` + "`(?:[^`\\\\]|\\\\.)*`?";
const WORDS = String.raw`0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?|[A-Za-z_]\w*`;

function pattern(language) {
  let comments = String.raw`\/\/[^\n]*|\/\*[^]*?(?:\*\/|$)`;
  if (HASH.has(language)) comments = "#[^\\n]*";
  else if (DASHES.has(language)) comments = "--[^\\n]*";
  else if (language === "html" || language === "xml") comments = "<!--[^]*?(?:-->|$)";
  return new RegExp(`(${comments})|(${STRINGS})|(${WORDS})`, "g");
}

/** The code as nodes. */
export function highlight(code, language) {
  if (PLAIN.has(language) || code.length > LONGEST) return [document.createTextNode(code)];
  const nodes = [];
  let end = 0;
  for (const match of code.matchAll(pattern(language))) {
    const kind = match[1] ? "comment" : match[2] ? "string" : /^\d/.test(match[3]) ? "number" : KEYWORDS.has(match[3]) ? "keyword" : null;
    if (!kind) continue;
    if (match.index > end) nodes.push(document.createTextNode(code.slice(end, match.index)));
    const span = document.createElement("span");
    span.className = `tok-${kind}`;
    span.textContent = match[0];
    nodes.push(span);
    end = match.index + match[0].length;
  }
  nodes.push(document.createTextNode(code.slice(end)));
  return nodes;
}
