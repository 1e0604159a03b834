// Byte-pair encoding of the reader's own text, a merge at a time.

import { LOOK, h } from "./draw.js";

// tinylm.tokenizer.PRETOKEN_PATTERN; JavaScript's \s is not Unicode's white space, which Python's regex means
const PRETOKEN = new RegExp("'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
  .replace("[^\\s", "[^\\p{White_Space}").replaceAll("\\s", "\\p{White_Space}")
  .replaceAll("\\S", "\\P{White_Space}"), "gu");
const MOST = 400; // merges

// A token is a string with a character for each byte, so that < compares as Python compares bytes.
function pretokens(text) {
  return (text.match(PRETOKEN) || []).map(word =>
    Array.from(new TextEncoder().encode(word), byte => String.fromCharCode(byte)));
}

function countPairs(words) {
  const pairs = new Map();
  for (const word of words)
    for (let i = 0; i + 1 < word.length; i++) {
      const key = word[i] + "\u0100" + word[i + 1], pair = pairs.get(key);
      if (pair) pair.count++;
      else pairs.set(key, { a: word[i], b: word[i + 1], count: 1 });
    }
  return [...pairs.values()];
}

// Whether the pair p goes before q: it is more frequent, or as frequent and lexicographically greater.
function before(p, q) {
  if (p.count !== q.count) return p.count > q.count;
  return p.a === q.a ? p.b > q.b : p.a > q.a;
}

function mergeWord(word, { a, b }) {
  const out = [];
  for (let i = 0; i < word.length; i++)
    if (word[i] === a && word[i + 1] === b) { out.push(a + b); i++; } else out.push(word[i]);
  return out;
}

// All states of the text, from bytes to where no pair is left.
function steps(text, most = MOST) {
  const states = [{ words: pretokens(text) }];
  while (states.length <= most) {
    const last = states.at(-1), pairs = countPairs(last.words);
    if (!pairs.length) break;
    last.pairs = pairs.sort((p, q) => before(p, q) ? -1 : 1).slice(0, 6);
    const best = pairs[0];
    last.ties = pairs.filter(p => p.count === best.count).length;
    states.push({ words: last.words.map(word => mergeWord(word, best)), best });
  }
  return states;
}

function merges(text, most) {
  const hex = token => Array.from(token, c => c.charCodeAt(0).toString(16).padStart(2, "0")).join("");
  return steps(text, most).slice(1).map(({ best }) => [hex(best.a), hex(best.b)]);
}

// What a reader can read of a token: bytes that are no whole letter are shown as numbers.
function readable(token) {
  const bytes = Uint8Array.from(token, c => c.charCodeAt(0));
  try {
    const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
    return text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  } catch {
    return Array.from(bytes, byte => "‹" + byte.toString(16).padStart(2, "0") + "›").join("");
  }
}

const STYLE = LOOK + `
.bpe textarea { width: 100%; resize: vertical; }
.bpe input[type=range] { flex: 1 1 9em; min-width: 0; }
.bpe .text { font-family: monospace; line-height: 2; max-height: 15em; overflow: auto; overflow-wrap: anywhere; margin-bottom: .6em; }
.bpe .word { margin-right: .45em; }
.bpe .token { padding: .15em .12em; border: 1px solid var(--line); border-radius: 3px; margin-right: 1px; white-space: pre; }
.bpe .token.two { background: color-mix(in srgb, var(--ink) 18%, transparent); }
.bpe .token.new { background: color-mix(in srgb, var(--warm) 45%, transparent); border-color: var(--warm); }
.bpe .made { font-family: monospace; font-size: 13px; overflow-wrap: anywhere; max-height: 7em; overflow: auto; }
`;

function render({ model, el }) {
  let states, now = 0;
  const text = h("textarea", { rows: 3, maxlength: 3000, value: model.get("text"), "aria-label": "your text" });
  const said = h("p", { "aria-live": "polite" }), shown = h("div", { class: "text", tabindex: 0, "aria-label": "the tokens", role: "group" });
  const leaders = h("div", { class: "small" }), made = h("div", { class: "made" });
  const slider = h("input", { type: "range", min: 0, value: 0, "aria-label": "number of merges" });
  const button = (label, by, name) => h("button", { type: "button", "aria-label": name, onclick: () => go(now + by) }, label);
  const back = button("◀", -1, "undo a merge"), on = button("merge ▶", 1, "merge"), ten = button("+10", 10, "ten merges");
  const peek = h("details", { class: "small" }, h("summary", {}, "Which pairs lead now?"), leaders);

  function go(step) {
    now = Math.max(0, Math.min(states.length - 1, step));
    const { words, best, pairs, ties } = states[now], fresh = best && best.a + best.b;
    const bytes = states[0].words.reduce((sum, word) => sum + word.length, 0);
    const count = words.reduce((sum, word) => sum + word.length, 0);
    const former = now && states[now - 1].ties;
    said.replaceChildren(now
      ? `Merge ${now}: ${readable(best.a)} + ${readable(best.b)} → ${readable(fresh)}, token ${255 + now}, found ${best.count === 1 ? "once" : best.count + " times"}`
        + (former > 1 ? `. ${former} pairs were tied; the greatest of them wins.` : ".")
      : "No merge yet: every byte is a token.", h("br"),
      `${bytes} bytes, ${count} tokens` + (count ? `: ${(bytes / count).toFixed(2)} bytes a token.` : "."));
    let number = 0;
    shown.replaceChildren(...words.map(word => h("span", { class: "word" }, ...word.map(token => h("span", {
      class: "token" + (token === fresh ? " new" : number++ % 2 ? " two" : ""),
      title: Array.from(token, c => c.charCodeAt(0)).join(" ") }, readable(token))))));
    leaders.replaceChildren(...(pairs || []).map(p => h("div", {}, `${p.count} × ${readable(p.a)} + ${readable(p.b)}`)));
    if (!pairs) leaders.append("none: " + (now < MOST ? "no token has a neighbor within its word." : "we stop here."));
    made.replaceChildren(states.slice(1, now + 1).map(s => readable(s.best.a + s.best.b)).join("  "));
    slider.value = now;
    back.disabled = now === 0;
    on.disabled = ten.disabled = now === states.length - 1;
  }

  function read() {
    states = steps(text.value.toWellFormed ? text.value.toWellFormed() : text.value);
    slider.max = states.length - 1;
    peek.open = false;
    go(0);
  }

  text.oninput = read;
  slider.oninput = () => go(+slider.value);
  el.append(h("style", {}, STYLE), h("div", { class: "bpe" },
    h("p", {}, h("b", {}, "Try it. "), "Which two neighbors will be merged first? Say it, then press ", h("i", {}, "merge"),
      ". Then put your own name into the text five times: after how many merges is it one token?"),
    text, h("div", { class: "row", style: "margin-top: .6em" }, back, on, ten, slider), said, shown, peek, made));
  read();
}

export default { render, merges, pretokens };
