// Four optimizers go down the valley of chapter 04, f(x, y) = (x^2 + c y^2) / 2.
import { LOOK, dial, dragging, h, s, whenWide } from "./draw.js";

const STEPS = 100;

// Newton-Schulz of tinylm.recipe, for a matrix of one row: its singular value is its length
function orthogonalized([x, y]) {
  const norm = Math.max(1e-7, Math.hypot(x, y));
  let length = Math.hypot(x, y) / norm;
  for (let i = 0; i < 5; i++) length = 3.4445 * length - 4.775 * length ** 3 + 2.0315 * length ** 5;
  return [x / norm * length, y / norm * length];
}

const RULES = {
  SGD: (w, g, memory, rate) => w.map((x, i) => x - rate * g[i]),
  momentum(w, g, memory, rate, beta) {
    memory.m = (memory.m || [0, 0]).map((m, i) => m + (1 - beta) * (g[i] - m));
    return w.map((x, i) => x - rate * memory.m[i]);
  },
  Adam(w, g, memory, rate, beta) {
    const t = memory.t = (memory.t || 0) + 1;
    memory.m = (memory.m || [0, 0]).map((m, i) => m + (1 - beta) * (g[i] - m));
    memory.v = (memory.v || [0, 0]).map((v, i) => v + .001 * (g[i] * g[i] - v));
    return w.map((x, i) => x - rate * memory.m[i] / (1 - beta ** t) / (Math.sqrt(memory.v[i] / (1 - .999 ** t)) + 1e-8));
  },
  Muon(w, g, memory, rate, beta) {
    memory.m = (memory.m || [0, 0]).map((m, i) => beta * m + (1 - beta) * g[i]);
    const ahead = orthogonalized(g.map((x, i) => (1 - beta) * x + beta * memory.m[i]));
    return w.map((x, i) => x - rate * ahead[i]);
  },
};

const height = ([x, y], curvature) => .5 * (x * x + curvature * y * y);

function walk(name, rate, beta, curvature, steps = STEPS, start = [-9, 2.5]) {
  const path = [start], memory = {};
  for (let t = 0; t < steps; t++) {
    const [x, y] = path.at(-1);
    path.push(RULES[name]([x, y], [x, curvature * y], memory, rate, beta));
  }
  return path;
}

const STYLE = LOOK + `
.valley svg { border: 1px solid var(--line); border-radius: 6px; margin: 6px 0; touch-action: pan-y; }
.valley .start { cursor: move; touch-action: none; }
.tinylm .valley button[aria-pressed] { border-left: 10px solid var(--own); }
.tinylm .valley button[aria-pressed="true"] { background: var(--soft); color: inherit; border-color: var(--own); }
.tinylm .valley button[aria-pressed="false"] { opacity: .5; }
`;
const COLORS = { SGD: "var(--ink)", momentum: "var(--warm)", Adam: "var(--green)", Muon: "var(--violet)" };

function render({ model, el }) {
  let width = 0, start = [-9, 2.5], timer = 0;
  const shown = Object.fromEntries(Object.keys(RULES).map(name => [name, true]));
  const power = x => +(10 ** x).toPrecision(2);
  const rate = dial("rate", { min: -2.3, max: .3, step: .005, value: -1.155 }, x => power(x), draw);
  const beta = dial("momentum", { min: 0, max: .99, step: .01, value: .9 }, x => x.toFixed(2), draw);
  const curvature = dial("curvature", { min: 0, max: 2, step: .02, value: Math.log10(25) }, x => power(x), draw);
  const step = dial("step", { min: 0, max: STEPS, step: 1, value: 40 }, x => x, draw);
  const play = h("button", { type: "button", class: "main", onclick: () => timer ? stop() : go() }, "▶ run");
  const toggles = Object.keys(RULES).map(name => h("button", { type: "button", "aria-pressed": "true", style: `--own: ${COLORS[name]}`, onclick(e) {
    shown[name] = !shown[name];
    e.currentTarget.setAttribute("aria-pressed", shown[name]);
    draw();
  } }, name));
  const picture = s("svg", { role: "group", "aria-label": "the valley from above" }), table = h("table", { "aria-live": "off" });
  const box = h("div", { class: "valley" });

  function stop() { clearInterval(timer); timer = 0; play.textContent = "▶ run"; }
  function go() {
    play.textContent = "❚❚ stop";
    step.input.value = step.value === STEPS ? 0 : step.value;
    if (step.value === 40) step.input.value = 0;
    timer = setInterval(() => {
      step.input.value = step.value + 1;
      step.tell();
      draw();
      if (step.value === STEPS || !box.isConnected) stop();
    }, 80);
  }

  function draw() {
    if (!width) return;
    const c = power(curvature.value), scale = width / 16, tall = Math.min(300, .55 * width), cx = 11.2 * scale, cy = tall / 2;
    const px = ([x, y]) => [cx + Math.max(-1e4, Math.min(1e4, x * scale)), cy - Math.max(-1e4, Math.min(1e4, y * scale))];
    const parts = [1, 5, 15, 40, 80, 140, 220].map(level => s("ellipse", { class: "faint", cx, cy, rx: scale * Math.sqrt(2 * level), ry: scale * Math.sqrt(2 * level / c) }));
    const rows = [];
    for (const name in RULES) {
      if (!shown[name]) continue;
      const path = walk(name, power(rate.value), beta.value, c, step.value, start), end = path.at(-1), loss = height(end, c);
      const seen = path.filter(w => w.every(Number.isFinite)).map(px);
      parts.push(s("polyline", { points: seen.map(p => p.map(x => x.toFixed(1)).join(",")).join(" "), fill: "none", stroke: COLORS[name], "stroke-width": 1.6, opacity: .85 }));
      for (const [x, y] of seen) if (Math.abs(x) < 2e3 && Math.abs(y) < 2e3) parts.push(s("circle", { cx: x, cy: y, r: 2.2, fill: COLORS[name] }));
      if (seen.length === path.length) parts.push(s("circle", { cx: seen.at(-1)[0], cy: seen.at(-1)[1], r: 6, fill: COLORS[name] }));
      const out = !(loss < 1e3);
      rows.push(h("tr", {}, h("td", {}, name), h("td", { class: "num", "data-loss": name }, out ? "flew out" : +loss.toPrecision(3)),
        h("td", { class: "num" }, out ? "" : `(${end.map(x => x.toFixed(2)).join(", ")})`)));
    }
    const [sx, sy] = px(start);
    const handle = s("circle", { class: "start", cx: sx, cy: sy, r: 10, fill: "var(--text)", "fill-opacity": .25, stroke: "var(--text)", tabindex: 0, role: "slider",
      "aria-label": "where they start", "aria-valuetext": start.map(x => x.toFixed(1)).join(", "), "aria-valuenow": start[0] });
    dragging(handle, () => {}, e => {
      const frame = picture.getBoundingClientRect();
      place((e.clientX - frame.left - cx) / scale, (cy - e.clientY + frame.top) / scale);
    });
    handle.onkeydown = e => {
      const by = { ArrowLeft: [-.5, 0], ArrowRight: [.5, 0], ArrowUp: [0, .5], ArrowDown: [0, -.5] }[e.key];
      if (by) { e.preventDefault(); place(start[0] + by[0], start[1] + by[1]); picture.querySelector(".start").focus({ preventScroll: true }); }
    };
    parts.push(s("text", { x: cx, y: cy + 6, "text-anchor": "middle", style: "font-size: 20px" }, "★"), handle);
    picture.setAttribute("viewBox", `0 0 ${width} ${tall}`);
    picture.style.overflow = "hidden";
    picture.style.maxWidth = width + 2 + "px";
    picture.replaceChildren(...parts);
    table.replaceChildren(h("tr", {}, h("th", {}, `after ${step.value} steps`), h("th", {}, "loss"), h("th", {}, "place")), ...rows);
  }

  const place = (x, y) => {
    start = [Math.max(-10.5, Math.min(4, x)), Math.max(-4, Math.min(4, y))];
    draw();
  };

  box.append(
    h("p", {}, h("b", {}, "Try it. "), "At curvature 25, plain descent bears a rate of 2/25 = 0.08. Which of the four will leave the valley first when you raise the rate? And which comes to rest? Predict, then drag."),
    h("div", { class: "row" }, toggles), picture, rate.line, beta.line, curvature.line, step.line, h("div", { class: "row" }, play), table,
    h("p", { class: "note" }, "One rate serves all four here; in use each has its own. Momentum is also Adam's first beta. Muon sees the two weights as a matrix of one row: of it only the direction is left, so each step is about as long as the rate."));
  el.append(h("style", {}, STYLE), box);
  whenWide(box, now => { width = Math.min(now, 640) - 2; draw(); });
}

export default { render, walk };
