// The model's chances at one place, reshaped by temperature, top-k and top-p; what is drawn from them.
import { draw, reshape } from "./model.js";

const CSS = `
.sampling .knobs { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 4px 20px; margin: 6px 0; }
.sampling .knobs label { display: grid; grid-template-columns: 1fr auto; gap: 0 8px; }
.sampling .knobs input { grid-column: 1 / 3; width: 100%; margin: 0; }
.sampling .option { display: grid; grid-template-columns: 6.5em 1fr 3.5em; gap: 8px; align-items: center; line-height: 1.4; }
.sampling .bar { position: relative; height: 12px; border: 1px solid transparent; }
.sampling .bar i { position: absolute; inset: 0 auto 0 0; border-radius: 2px; }
.sampling .bar .said { border: 1px solid var(--grey); }
.sampling .bar .now { background: var(--warm); }
.sampling .rest .now { background: var(--grey); }
.sampling .out { opacity: .55; }
.sampling .option span:last-child { text-align: right; }
.sampling .drawn { min-height: 3em; }
.sampling .drawn b { color: var(--warm); }`;

const SHOWN = 12, DRAWS = 20;
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};
const percent = p => p === 0 ? "0" : p < 0.0005 ? "<0.1%" : `${(100 * p).toFixed(1)}%`;

export default {
  render({ model, el }) {
    const words = model.get("words"), logits = Float64Array.from(model.get("logits")); // the most likely first
    const plain = reshape(logits);
    const knobs = {}, knob = (name, label, min, max, step, value, tell) => {
      const input = make("input", { type: "range", min, max, step, value, "aria-label": label }), said = make("b", { class: "num" });
      input.oninput = () => show();
      knobs[name] = { input, read: () => { said.textContent = tell(+input.value); return +input.value; } };
      return make("label", {}, label, said, input);
    };
    const rows = make("div", {}), about = make("div", { class: "note num", role: "status" });
    const drawn = make("div", { class: "drawn", "aria-live": "polite" });
    const again = make("button", { class: "main" }, `Draw ${DRAWS}`), reset = make("button", {}, "Reset");
    let probs;

    function show() {
      const temperature = knobs.temperature.read(), k = knobs.k.read(), p = knobs.p.read() / 100;
      probs = reshape(logits, temperature, k === SHOWN + 1 ? 0 : k, p);
      const tail = chances => chances.slice(SHOWN).reduce((a, b) => a + b, 0), left = probs.filter(q => q > 0).length;
      const most = Math.max(probs[0], plain[0], tail(probs));
      const row = (word, now, said, kind) => make("div", { class: `option num ${kind} ${now ? "" : "out"}` }, make("span", {}, word),
        make("span", { class: "bar" }, make("i", { class: "now", style: `width:${100 * now / most}%` }),
          make("i", { class: "said", style: `width:${100 * said / most}%` })),
        make("span", {}, percent(now)));
      rows.replaceChildren(...words.slice(0, SHOWN).map((word, i) => row(word, probs[i], plain[i], "")),
        row(`${words.length - SHOWN} others`, tail(probs), tail(plain), "rest"));
      about.textContent = `${left} of ${words.length} tokens may be drawn; outlined: what the model said, which gives the others together ${percent(tail(plain))}.`;
      drawn.replaceChildren();
    }

    again.onclick = () => {
      const found = Array.from({ length: DRAWS }, () => draw(probs));
      drawn.replaceChildren(...found.flatMap(i => [i < SHOWN ? make("span", {}, words[i]) : make("b", {}, words[i]), ", "]).slice(0, -1),
        `. (${found.filter(i => i >= SHOWN).length} of ${DRAWS} from the tail.)`);
    };
    reset.onclick = () => {
      for (const { input } of Object.values(knobs)) input.value = input.getAttribute("value");
      show();
    };
    el.className = "sampling";
    el.append(make("style", {}, CSS), make("div", { class: "note" }, `What comes after: “${model.get("before")} …”?`),
      make("div", { class: "knobs" },
        knob("temperature", "temperature", 0, 3, 0.05, 1, t => t.toFixed(2)),
        knob("k", "top-k", 1, SHOWN + 1, 1, SHOWN + 1, k => k > SHOWN ? "all" : k),
        knob("p", "top-p", 1, 100, 1, 100, p => p === 100 ? "all" : (p / 100).toFixed(2))),
      rows, about, make("div", { class: "row" }, again, reset), drawn);
    show();
  },
};
