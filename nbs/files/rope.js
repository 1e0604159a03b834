// Two words on a line, a query and a key: the hands of RoPE turn, and the score knows only their distance.
import { LOOK, dragging, h, s, whenWide } from "./draw.js";

const LAST = 31; // positions 0 to 31

function turned(vector, position, theta) {
  const out = [];
  for (let i = 0; i < vector.length; i += 2) {
    const angle = position * theta ** (-i / vector.length), cos = Math.cos(angle), sin = Math.sin(angle);
    out.push(vector[i] * cos - vector[i + 1] * sin, vector[i] * sin + vector[i + 1] * cos);
  }
  return out;
}

function score(query, key, m, n, theta) {
  const q = turned(query, m, theta), k = turned(key, n, theta);
  return q.reduce((sum, x, i) => sum + x * k[i], 0);
}

const STYLE = LOOK + `
.rope svg text { text-anchor: middle; }
.rope .handle { cursor: grab; touch-action: none; }
.rope .handle text { fill: #fff; font-weight: bold; }
`;
const Q = "#2f86c9", K = "#d2691e", BOTH = "#7b6fc4";

function render({ model, el }) {
  const query = model.get("query"), key = model.get("key"), theta = model.get("theta");
  const at = { query: model.get("positions")[0], key: model.get("positions")[1] };
  const picture = s("svg", { role: "group", "aria-label": "positions, hands and score" });
  const said = h("p", { "aria-live": "polite" });
  const box = h("div", { class: "rope" },
    h("p", {}, h("b", {}, "Try it. "), "Drag Q or K along the line, or use the arrow keys. Then take the bar between them, which moves both. ",
      "Before you do: which of the four hands will turn, and what will the score do?"), picture, said);
  el.append(h("style", {}, STYLE), box);
  let width = 0, focused = null;
  const x = position => 16 + position * (width - 32) / LAST;

  function move(what, by) { // as far as the line goes
    const low = what === "both" ? Math.min(at.query, at.key) : at[what];
    const high = what === "both" ? Math.max(at.query, at.key) : at[what];
    by = Math.max(-low, Math.min(LAST - high, by));
    if (what !== "key") at.query += by;
    if (what !== "query") at.key += by;
    draw();
  }

  function handle(what, label, color, shape, now, max) {
    const node = s("g", { class: "handle", tabindex: 0, role: "slider", "data-what": what, "aria-label": label,
      "aria-valuemin": 0, "aria-valuemax": max, "aria-valuenow": now, fill: color }, ...shape);
    let from = 0;
    dragging(node, e => { from = e.clientX; focused = what; node.focus({ preventScroll: true }); }, e => {
      const by = Math.round((e.clientX - from) / (x(1) - x(0)));
      if (by) { from += by * (x(1) - x(0)); move(what, by); }
    });
    node.onkeydown = e => {
      const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageUp: 5, PageDown: -5, Home: -LAST, End: LAST }[e.key];
      if (by) { e.preventDefault(); focused = what; move(what, by); }
    };
    return node;
  }

  function arrow(cx, cy, size, [u, v], color) {
    return s("line", { x1: cx, y1: cy, x2: cx + size * u, y2: cy - size * v, stroke: color, "stroke-width": 3, "stroke-linecap": "round" });
  }

  function draw() {
    const active = picture.contains(document.activeElement);
    const q = turned(query, at.query, theta), k = turned(key, at.key, theta), pairs = query.length / 2;
    const each = Math.min(130, width / pairs), radius = each * .36, top = 98 + radius, parts = [];
    const line = 44, low = Math.min(at.query, at.key), high = Math.max(at.query, at.key);
    parts.push(s("line", { class: "faint", x1: x(0), x2: x(LAST), y1: line, y2: line }));
    for (let i = 0; i <= LAST; i++) parts.push(s("circle", { cx: x(i), cy: line, r: 1.8, fill: "currentColor", opacity: .5 }));
    for (const i of [0, 10, 20, 30]) parts.push(s("text", { x: x(i), y: line + 29 }, String(i)));
    parts.push(handle("both", "both positions", BOTH, [
      s("rect", { x: x(low) - 8, y: line - 42, width: x(high) - x(low) + 16, height: 29, fill: "transparent" }),
      s("rect", { x: x(low) - 4, y: line - 33, width: x(high) - x(low) + 8, height: 14, rx: 7 })], low, LAST - high + low));
    for (const [what, letter, color] of [["query", "Q", Q], ["key", "K", K]])
      parts.push(handle(what, `position of the ${what}`, color, [s("circle", { cx: x(at[what]), cy: line, r: 13 }),
        s("text", { x: x(at[what]), y: line + 4.5 }, letter)], at[what], LAST));
    let total = 0;
    for (let i = 0; i < pairs; i++) {
      const cx = each * (i + .5), speed = theta ** (-2 * i / query.length), part = q[2 * i] * k[2 * i] + q[2 * i + 1] * k[2 * i + 1];
      total += part;
      parts.push(s("circle", { class: "faint", cx, cy: top, r: radius }),
        arrow(cx, top, radius, k.slice(2 * i, 2 * i + 2), K), arrow(cx, top, radius, q.slice(2 * i, 2 * i + 2), Q),
        s("text", { x: cx, y: top + radius + 22 }, speed >= 1 ? "1 rad/token" : String(+speed.toPrecision(2))),
        s("text", { x: cx, y: top + radius + 40 }, part.toFixed(2)));
    }
    // the score at every distance, and the point where we are
    const graph = top + radius + 60, tall = 84, distances = Array.from({ length: 8 * LAST + 1 }, (_, i) => i / 4 - LAST);
    const scores = distances.map(d => score(query, key, d, 0, theta)), least = Math.min(0, ...scores), most = Math.max(...scores);
    const gx = d => 16 + (d + LAST) / (2 * LAST) * (width - 32), gy = value => graph + tall * (most - value) / (most - least);
    parts.push(s("line", { class: "faint", x1: 16, x2: width - 16, y1: gy(0), y2: gy(0) }),
      s("polyline", { points: distances.map((d, i) => `${gx(d).toFixed(1)},${gy(scores[i]).toFixed(1)}`).join(" "),
        fill: "none", stroke: "var(--text)", "stroke-width": 1.5 }),
      s("circle", { cx: gx(at.query - at.key), cy: gy(total), r: 6, fill: BOTH }),
      s("text", { x: width / 2, y: graph + tall + 18 }, "the score at each distance Q minus K"));
    const tallest = graph + tall + 24;
    picture.setAttribute("viewBox", `0 0 ${width} ${tallest}`);
    picture.style.maxWidth = width + "px";
    picture.replaceChildren(...parts);
    if (active && focused) picture.querySelector(`[data-what=${focused}]`).focus({ preventScroll: true });
    const apart = at.query - at.key;
    said.textContent = `Query at ${at.query}, key at ${at.key}: ${apart < 0 ? "the key is " + -apart + " ahead" : "distance " + apart}. Score ${total.toFixed(4)}, the sum of the four.`;
  }

  whenWide(box, now => { width = Math.min(now, 640); draw(); });
}

export default { render, score };
