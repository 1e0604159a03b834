// What a model costs: the formulas of chapter 03 (parameter_table, flops_per_token, memory_table of tinylm.model).
import { LOOK, dial, h } from "./draw.js";

function costs({ vocab_size: V, context_length: T, d_model: D, num_layers: L, num_heads: H, d_ff: F, batch_size: B, short = false }) {
  const parts = { "token embeddings": V * D, attention: L * 4 * D * D, "feed-forward": L * 3 * D * F, norms: (2 * L + 1) * D, head: V * D };
  const parameters = Object.values(parts).reduce((sum, n) => sum + n, 0), weights = 4 * parameters;
  const matrices = parts.attention + parts["feed-forward"] + V * D, tokens = B * T;
  const inProducts = L * ((short ? 10 : 6) * D + 3 * F) + D, exact = (2 * L + 1) * (D + 1) + L * H + 2;
  const memory = {
    weights: weights + (short ? 2 * matrices : 0), gradients: weights, optimizer: 2 * weights,
    activations: tokens * ((short ? 2 : 4) * inProducts + 4 * exact), "logits and their gradient": tokens * (short ? 10 : 8) * V };
  return { parts, parameters, memory, flops: 2 * (matrices + L * 2 * T * D), tokens };
}

const LISTS = {
  vocab_size: ["vocabulary", [256, 512, 1024, 1792, 4096, 10000, 32000, 50304, 128256]],
  context_length: ["context", [64, 128, 256, 512, 1024, 2048, 4096, 8192]],
  d_model: ["width", [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096]],
  num_layers: ["layers", [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48]],
  num_heads: ["heads", [1, 2, 4, 8, 12, 16, 24, 32]],
  d_ff: ["feed-forward", [64, 96, 128, 176, 256, 352, 512, 704, 1024, 1344, 2048, 2736, 4096, 5504, 8192, 11008]],
  batch_size: ["batch", [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]],
  steps: ["steps", [40, 100, 300, 1200, 3000, 10000, 20000, 50000, 100000]],
  speed: ["GFLOP/s", [1, 5, 20, 40, 80, 160, 500, 2000, 10000, 50000, 200000, 400000]],
};

function readable(n, unit = "") {
  const at = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([size]) => n >= size) || [1, ""];
  return +(n / at[0]).toPrecision(3) + (at[1] || unit ? " " : "") + at[1] + unit;
}

function duration(seconds) {
  const [size, name] = [[31557600, "years"], [86400, "days"], [3600, "hours"], [60, "minutes"]].find(([size]) => seconds >= 2 * size) || [1, "seconds"];
  return +(seconds / size).toPrecision(3) + " " + name;
}

const STYLE = LOOK + `
.calculator .both { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19em, 100%), 1fr)); gap: 6px 24px; }
.calculator .bar { display: flex; height: 16px; margin: 2px 0 10px; border-radius: 4px; overflow: hidden; background: var(--soft); }
.calculator .bar i { display: block; }
.calculator .key { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .35em; }
.calculator .total { font-size: 1.25em; font-weight: 600; }
.calculator table { width: 100%; }
`;
const COLORS = ["var(--ink)", "var(--warm)", "var(--green)", "var(--violet)", "var(--grey)"];

function render({ model, el }) {
  const presets = model.get("presets"), dials = {}, outcome = h("div", { "aria-live": "polite" });
  const short = h("input", { type: "checkbox" });
  const exact = {}; // values of a preset that no list has
  for (const [name, [label, list]] of Object.entries(LISTS))
    dials[name] = dial(label, { min: 0, max: list.length - 1, step: 1, value: 0, "data-name": name },
      i => (exact[name] ?? list[i]).toLocaleString("en"), () => {
        delete exact[name];
        if (name === "d_model") set("d_ff", values().d_model * 8 / 3);
        dials[name].tell();
        draw();
      });

  const values = () => Object.fromEntries(Object.entries(LISTS).map(([name, [, list]]) => [name, exact[name] ?? list[dials[name].value]]));

  function set(name, wanted) { // to the nearest of the list
    const list = LISTS[name][1], gap = x => Math.abs(Math.log(x / wanted));
    dials[name].input.value = list.indexOf(list.reduce((best, x) => gap(x) < gap(best) ? x : best));
    delete exact[name];
    dials[name].tell();
  }

  function choose(preset) {
    for (const name in presets[preset]) {
      set(name, presets[preset][name]);
      exact[name] = presets[preset][name];
      dials[name].tell();
    }
    draw();
  }

  function shares(title, total, parts, unit) {
    const sum = Object.values(parts).reduce((sum, n) => sum + n, 0), entries = Object.entries(parts);
    return h("div", {}, h("div", {}, title + " ", h("span", { class: "total num", "data-total": title }, total)),
      h("div", { class: "bar" }, entries.map(([name, n], i) => h("i", { style: `width: ${100 * n / sum}%; background: ${COLORS[i]}`, title: name }))),
      h("table", {}, entries.map(([name, n], i) => h("tr", {}, h("td", {}, h("span", { class: "key", style: `background: ${COLORS[i]}` }), name),
        h("td", { class: "num" }, readable(n, unit)), h("td", { class: "num" }, Math.round(100 * n / sum) + "%")))));
  }

  function draw() {
    const now = values(), { parts, parameters, memory, flops, tokens } = costs({ ...now, short: short.checked });
    const bytes = Object.values(memory).reduce((sum, n) => sum + n, 0), step = 3 * flops * tokens, seconds = step * now.steps / (now.speed * 1e9);
    const row = (name, value) => h("tr", {}, h("td", {}, name), h("td", { class: "num", "data-total": name }, value));
    const wrong = now.d_model % (2 * now.num_heads) ? h("p", { class: "note", role: "alert" },
      `No such model: the width ${now.d_model} must be a multiple of twice the heads (RoPE turns pairs).`) : "";
    outcome.replaceChildren(wrong, h("div", { class: "both" },
      shares("parameters", parameters.toLocaleString("en"), parts, ""), shares("memory of a step", readable(bytes, "B"), memory, "B")),
      h("table", {}, row("operations per token, forward", readable(flops)), row("operations per step, three times as many", readable(step)),
        row("tokens of all steps", readable(tokens * now.steps)), row("time", duration(seconds))));
  }

  short.onchange = draw;
  el.append(h("style", {}, STYLE), h("div", { class: "calculator" },
    h("p", {}, h("b", {}, "Try it. "), "Choose ", h("i", {}, "reference"), ". Predict what doubles the memory of a step: twice the width, twice the layers or twice the batch? Then drag."),
    h("div", { class: "row", role: "group", "aria-label": "presets" }, Object.keys(presets).map(name => h("button", { type: "button", onclick: () => choose(name) }, name)),
      h("label", {}, short, "bfloat16")),
    h("div", { class: "both" }, Object.values(dials).map(d => d.line)), outcome));
  choose(Object.keys(presets)[1]);
}

export default { render, costs };
