// The records of chapter 06: final losses against the rate, learning curves, and paired differences with their intervals.
import { LOOK, dial, h, s, whenWide } from "./draw.js";

// 95% quantiles of Student's T, by degrees of freedom
const T95 = [, 12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.306, 2.26216];

// Mean and half width of the differences of the seeds that both have; null for a mean after a divergence.
function difference(ours, base) {
  const gaps = Object.keys(ours).filter(seed => seed in base).map(seed => ours[seed] - base[seed]), n = gaps.length;
  const mean = gaps.reduce((sum, x) => sum + x, 0) / n;
  if (!Number.isFinite(mean)) return { n, mean: null, half: null };
  const spread = Math.sqrt(gaps.reduce((sum, x) => sum + (x - mean) ** 2, 0) / (n - 1));
  return { n, mean, half: n > 1 ? T95[n - 1] * spread / Math.sqrt(n) : null };
}

const LOOKS = { baseline: ["var(--ink)", "0"], "post-norm": ["var(--warm)", "7 3"], nope: ["var(--green)", "9 3 2 3"], silu: ["var(--violet)", "2 3"],
  "no-norm": ["#b98f14", "0"], "no-norm-low-lr": ["var(--grey)", "7 3"] };
const STYLE = LOOK + `
.records .charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19em, 100%), 1fr)); gap: 12px; }
.records td { white-space: nowrap; }
.records svg text { font-size: 12px; }
.records svg .hit { cursor: pointer; }
.tinylm .records button[aria-pressed] { border-left: 10px solid var(--own); padding: 3px 8px; }
.tinylm .records button[aria-pressed="true"] { background: var(--soft); color: inherit; border-color: var(--own); }
.tinylm .records button[aria-pressed="false"] { opacity: .5; }
`;

function render({ model, el }) {
  const texts = model.get("texts"); // {name: {steps, floor, runs: [[variant, rate, seed, loss, diverged at, curve]]}}
  let text = Object.keys(texts)[0], rates = [], runs = [], width = 0;
  const hidden = new Set(), box = h("div", { class: "records" });
  const choice = h("select", { "aria-label": "text", onchange: () => { text = choice.value; read(); } }, Object.keys(texts).map(name => h("option", { value: name }, name)));
  const toggles = h("div", { class: "row", role: "group", "aria-label": "variants" }), charts = h("div", { class: "charts" }), table = h("table", { "aria-live": "polite" });
  const rate = dial("rate", { min: 0, max: 9, step: 1, value: 0 }, i => String(rates[i] ?? ""), draw);

  function read() {
    runs = texts[text].runs.map(([variant, lr, seed, loss, died, curve]) => ({ variant, lr, seed, loss: loss ?? Infinity, died, curve }));
    rates = [...new Set(runs.map(run => run.lr))].sort((a, b) => a - b);
    const fresh = rates.findIndex(lr => runs.filter(run => run.lr === lr && run.variant === "baseline").length > 3);
    rate.input.max = rates.length - 1;
    rate.input.value = Math.max(0, fresh);
    rate.tell();
    toggles.replaceChildren(...Object.keys(LOOKS).filter(name => runs.some(run => run.variant === name)).map(name => h("button", {
      type: "button", "aria-pressed": String(!hidden.has(name)), style: `--own: ${LOOKS[name][0]}`, onclick(e) {
        if (!hidden.delete(name)) hidden.add(name);
        e.currentTarget.setAttribute("aria-pressed", !hidden.has(name));
        draw();
      } }, name)));
    draw();
  }

  // The runs of a variant at a rate: those on fresh seeds where there are any, else the one of the search.
  function group(variant, lr) {
    const all = runs.filter(run => run.variant === variant && run.lr === lr), fresh = all.filter(run => run.seed > 0);
    return fresh.length ? fresh : all;
  }

  function frame(wide, tall, title, [low, high], ticks, y, xs, x) {
    const parts = [s("text", { x: 0, y: 13, style: "font-weight: 600" }, title)];
    for (const tick of ticks.filter(t => t >= low && t <= high))
      parts.push(s("line", { class: "faint", x1: 30, x2: wide, y1: y(tick), y2: y(tick), "stroke-dasharray": "1 4" }), s("text", { x: 26, y: y(tick) + 4, "text-anchor": "end" }, String(tick)));
    for (const tick of xs) parts.push(s("text", { x: Math.min(x(tick), wide - 12), y: tall - 2, "text-anchor": "middle" }, String(tick)));
    return parts;
  }

  function draw() {
    if (!width) return;
    const wide = width > 640 ? (width - 12) / 2 : width, tall = 230, top = 26, bottom = tall - 20, lr = rates[rate.value];
    const names = Object.keys(LOOKS).filter(name => !hidden.has(name) && runs.some(run => run.variant === name));
    const losses = runs.map(run => run.loss).filter(Number.isFinite), low = Math.min(...losses), high = low + Math.min(1.6, Math.max(...losses) - low);
    const y = loss => bottom - (Math.min(loss, high) - low) / (high - low) * (bottom - top - 14);
    const x = lr => 44 + (wide - 62) * Math.log(lr / rates[0]) / Math.log(rates.at(-1) / rates[0]);
    const few = rates.filter((lr, i) => i === 0 || i === rates.length - 1 || [.003, .01, .03, .1].includes(lr));
    const left = frame(wide, tall, "final validation loss by rate", [low, high], [.25, .5, .75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5], y, few, x);
    left.push(s("line", { x1: x(lr), x2: x(lr), y1: top, y2: bottom, stroke: "var(--grey)", "stroke-width": 12, opacity: .25 }));
    for (const name of names) {
      const [color, dash] = LOOKS[name], means = [];
      for (const at of rates) {
        const runsHere = group(name, at), alive = runsHere.filter(run => Number.isFinite(run.loss));
        if (alive.length && alive.length === runsHere.length) means.push([x(at), y(alive.reduce((sum, run) => sum + run.loss, 0) / alive.length)]);
        for (const run of runsHere) left.push(run.died
          ? s("text", { x: x(at), y: top + 4, "text-anchor": "middle", style: `fill: ${color}; font-size: 15px` }, "×")
          : s("circle", { cx: x(at), cy: y(run.loss), r: 3.2, fill: color }));
      }
      left.push(s("polyline", { points: means.map(p => p.join(",")).join(" "), fill: "none", stroke: color, "stroke-dasharray": dash, "stroke-width": 1.6 }));
    }
    for (const at of rates) left.push(s("rect", { class: "hit", x: x(at) - 11, y: top, width: 22, height: bottom - top, fill: "transparent", onclick: () => { rate.input.value = rates.indexOf(at); rate.tell(); draw(); } }));

    const { steps, floor } = texts[text], log = Math.log, from = log(.9 * (floor || low)), to = log(8);
    const ly = loss => bottom - (log(Math.min(Math.max(loss, .1), 8)) - from) / (to - from) * (bottom - top);
    const lx = step => 34 + (wide - 40) * step / steps.at(-1);
    const right = frame(wide, tall, `training loss at rate ${lr}`, [Math.exp(from), 8], [.25, .5, 1, 2, 3, 4, 6, 8], ly, [0, steps.at(-1) / 2, steps.at(-1)], lx);
    if (floor) right.push(s("line", { x1: 34, x2: wide, y1: ly(floor), y2: ly(floor), stroke: "var(--text)", "stroke-dasharray": "2 3" }), s("text", { x: wide, y: ly(floor) - 5, "text-anchor": "end" }, `floor ${floor.toFixed(3)}`));
    for (const name of names) for (const run of group(name, lr)) {
      const points = run.curve.map((loss, i) => [lx(steps[i]), ly(loss)]);
      right.push(s("polyline", { points: points.map(p => p.map(v => v.toFixed(1)).join(",")).join(" "), fill: "none", stroke: LOOKS[name][0], "stroke-dasharray": LOOKS[name][1], "stroke-width": 1.4, opacity: .8 }));
      if (run.died) right.push(s("text", { x: lx(run.died), y: (points.at(-1) || [0, top + 14])[1] + 5, "text-anchor": "middle", style: `fill: ${LOOKS[name][0]}; font-size: 18px` }, "×"));
    }
    charts.replaceChildren(...[left, right].map((parts, i) => s("svg", { viewBox: `0 0 ${wide} ${tall}`, role: "img", "aria-label": ["final loss against the rate", "learning curves"][i] }, ...parts)));

    const bySeed = name => Object.fromEntries(group(name, lr).map(run => [run.seed, run.loss])), base = bySeed("baseline");
    table.replaceChildren(h("tr", {}, ["at rate " + lr, "runs", "loss", "minus baseline"].map(name => h("th", {}, name))),
      ...names.filter(name => group(name, lr).length).map(name => {
        const ours = bySeed(name), values = Object.values(ours), lost = values.filter(v => !Number.isFinite(v)).length, { n, mean, half } = difference(ours, base);
        const gap = name === "baseline" || mean === null ? "" : (mean < 0 ? "−" : "+") + Math.abs(mean).toFixed(4) + (half === null ? " (one seed)" : ` ± ${half.toFixed(4)}`);
        return h("tr", { "data-row": name }, h("td", {}, name), h("td", {}, values.length + (lost ? `, ${lost} lost` : "")),
          h("td", {}, lost ? "" : (values.reduce((sum, v) => sum + v, 0) / values.length).toFixed(4)), h("td", {}, n ? gap : ""));
      }));
  }

  box.append(h("p", {}, h("b", {}, "Try it. "), "Slide through the rates. At which does the first model without norms die (×)? And at which rate is post-norm even with the baseline? Say a number first."),
    h("div", { class: "row" }, h("label", {}, "text", choice)), toggles, rate.line, charts, h("div", { style: "overflow-x: auto" }, table),
    h("p", { class: "note" }, "Fresh seeds where there are any, else the one run of the search. Differences are paired by seed, at the same rate, ± half a 95% interval. Curves are thinned."));
  el.append(h("style", {}, STYLE), box);
  whenWide(charts, now => { width = now; draw(); });
  read();
}

export default { render, difference };
