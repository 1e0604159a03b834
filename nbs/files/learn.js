// A small Transformer learns in a worker of the page: plain numbers, gradients by hand, the names of tinylm.model.
import { LOOK, h, s, whenWide } from "./draw.js";

// All that the worker needs; its text is sent there.
function learner() {
  const zeros = n => new Float64Array(n);

  // y = x W^T for n rows of d numbers, W of shape (m, d); four outputs at a time
  function linear(x, w, n, d, m) {
    const y = zeros(n * m);
    for (let t = 0; t < n; t++) {
      const a = t * d;
      let o = 0;
      for (; o + 3 < m; o += 4) {
        const w0 = o * d, w1 = w0 + d, w2 = w1 + d, w3 = w2 + d;
        let s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        for (let i = 0; i < d; i++) {
          const v = x[a + i];
          s0 += v * w[w0 + i]; s1 += v * w[w1 + i]; s2 += v * w[w2 + i]; s3 += v * w[w3 + i];
        }
        y[t * m + o] = s0; y[t * m + o + 1] = s1; y[t * m + o + 2] = s2; y[t * m + o + 3] = s3;
      }
      for (; o < m; o++) {
        let sum = 0;
        for (let i = 0; i < d; i++) sum += x[a + i] * w[o * d + i];
        y[t * m + o] = sum;
      }
    }
    return y;
  }

  // out (rows, d) += a B, B of shape (inner, d); a's element is a[row * byRow + j * byInner]; four at a time
  function addProduct(out, a, b, rows, inner, d, byRow, byInner) {
    for (let r = 0; r < rows; r++) {
      const to = r * d, from = r * byRow;
      let j = 0;
      for (; j + 3 < inner; j += 4) {
        const a0 = a[from + j * byInner], a1 = a[from + (j + 1) * byInner], a2 = a[from + (j + 2) * byInner], a3 = a[from + (j + 3) * byInner];
        const b0 = j * d, b1 = b0 + d, b2 = b1 + d, b3 = b2 + d;
        for (let i = 0; i < d; i++) out[to + i] += a0 * b[b0 + i] + a1 * b[b1 + i] + a2 * b[b2 + i] + a3 * b[b3 + i];
      }
      for (; j < inner; j++) {
        const v = a[from + j * byInner];
        for (let i = 0; i < d; i++) out[to + i] += v * b[j * d + i];
      }
    }
  }

  // dx += dy W, dW += dy^T x
  function linearBack(dy, x, w, dx, dw, n, d, m) {
    addProduct(dx, dy, w, n, m, d, m, 1);
    addProduct(dw, dy, x, m, n, d, 1, m);
  }

  function norm(x, gain, n, d) {
    if (!gain) return { y: x };
    const y = zeros(n * d), inverse = zeros(n);
    for (let t = 0; t < n; t++) {
      let sum = 0;
      for (let i = 0; i < d; i++) sum += x[t * d + i] ** 2;
      const r = inverse[t] = 1 / Math.sqrt(sum / d + 1e-5);
      for (let i = 0; i < d; i++) y[t * d + i] = x[t * d + i] * r * gain[i];
    }
    return { y, inverse };
  }

  function normBack(dy, x, gain, inverse, dx, dgain, n, d) {
    for (let t = 0; t < n; t++) {
      if (!gain) { for (let i = t * d; i < t * d + d; i++) dx[i] += dy[i]; continue; }
      const r = inverse[t];
      let dot = 0;
      for (let i = 0; i < d; i++) {
        dot += dy[t * d + i] * gain[i] * x[t * d + i];
        dgain[i] += dy[t * d + i] * x[t * d + i] * r;
      }
      for (let i = 0; i < d; i++) dx[t * d + i] += r * (dy[t * d + i] * gain[i] - x[t * d + i] * dot * r * r / d);
    }
  }

  // Turn pairs (2i, 2i + 1) of each head by their angles, forward or back.
  function rotate(x, { num_heads: H, d_model: D, rope_theta }, n, T, sign) {
    const K = D / H;
    for (let t = 0; t < n; t++)
      for (let j = 0; j < D; j += 2) {
        const angle = sign * (t % T) * rope_theta ** (-(j % K) / K), cos = Math.cos(angle), sin = Math.sin(angle);
        const a = x[t * D + j], b = x[t * D + j + 1];
        x[t * D + j] = a * cos - b * sin;
        x[t * D + j + 1] = a * sin + b * cos;
      }
  }

  function attend(q, k, v, H, D, B, T) {
    const out = zeros(B * T * D), p = zeros(B * H * T * T), K = D / H, scale = 1 / Math.sqrt(K);
    for (let b = 0; b < B; b++) for (let head = 0; head < H; head++) for (let t = 0; t < T; t++) {
      const row = ((b * H + head) * T + t) * T, from = (b * T + t) * D + head * K;
      let most = -Infinity, sum = 0;
      for (let u = 0; u <= t; u++) {
        const other = (b * T + u) * D + head * K;
        let dot = 0;
        for (let i = 0; i < K; i++) dot += q[from + i] * k[other + i];
        p[row + u] = dot * scale;
        most = Math.max(most, p[row + u]);
      }
      for (let u = 0; u <= t; u++) sum += p[row + u] = Math.exp(p[row + u] - most);
      for (let u = 0; u <= t; u++) {
        const weight = p[row + u] /= sum, other = (b * T + u) * D + head * K;
        for (let i = 0; i < K; i++) out[from + i] += weight * v[other + i];
      }
    }
    return { out, p };
  }

  function attendBack(dout, q, k, v, p, dq, dk, dv, H, D, B, T) {
    const K = D / H, scale = 1 / Math.sqrt(K), dp = zeros(T);
    for (let b = 0; b < B; b++) for (let head = 0; head < H; head++) for (let t = 0; t < T; t++) {
      const row = ((b * H + head) * T + t) * T, from = (b * T + t) * D + head * K;
      let dot = 0;
      for (let u = 0; u <= t; u++) {
        const other = (b * T + u) * D + head * K;
        let sum = 0;
        for (let i = 0; i < K; i++) {
          sum += dout[from + i] * v[other + i];
          dv[other + i] += p[row + u] * dout[from + i];
        }
        dp[u] = sum;
        dot += sum * p[row + u];
      }
      for (let u = 0; u <= t; u++) {
        const ds = p[row + u] * (dp[u] - dot) * scale, other = (b * T + u) * D + head * K;
        for (let i = 0; i < K; i++) {
          dq[from + i] += ds * k[other + i];
          dk[other + i] += ds * q[from + i];
        }
      }
    }
  }

  // Logits of B rows of T ids, and what the way back needs.
  function forward(c, W, ids, B, T) {
    const { d_model: D, d_ff: F, num_heads: H } = c, n = B * T, layers = [];
    let x = zeros(n * D);
    for (let t = 0; t < n; t++) for (let i = 0; i < D; i++) x[t * D + i] = W["token_embeddings.weight"][ids[t] * D + i];
    for (let l = 0; l < c.num_layers; l++) {
      const w = name => W[`layers.${l}.${name}.weight`], first = norm(x, w("ln1"), n, D);
      const [q, k, v] = ["q", "k", "v"].map(name => linear(first.y, w(`attn.${name}_proj`), n, D, D));
      rotate(q, c, n, T, 1);
      rotate(k, c, n, T, 1);
      const { out, p } = attend(q, k, v, H, D, B, T), middle = linear(out, w("attn.output_proj"), n, D, D);
      for (let i = 0; i < middle.length; i++) middle[i] += x[i];
      const second = norm(middle, w("ln2"), n, D), gate = linear(second.y, w("ffn.w1"), n, D, F), up = linear(second.y, w("ffn.w3"), n, D, F);
      const hidden = gate.map((g, i) => g / (1 + Math.exp(-g)) * up[i]), end = linear(hidden, w("ffn.w2"), n, F, D);
      for (let i = 0; i < end.length; i++) end[i] += middle[i];
      layers.push({ x, first, q, k, v, out, p, middle, second, gate, up, hidden });
      x = end;
    }
    const last = norm(x, W["ln_final.weight"], n, D);
    return { layers, x, last, logits: linear(last.y, W["lm_head.weight"], n, D, c.vocab_size) };
  }

  // Mean surprise at the targets; the logits become its gradient.
  function surprise(logits, targets, V) {
    const n = targets.length;
    let loss = 0;
    for (let t = 0; t < n; t++) {
      let most = -Infinity, sum = 0;
      for (let i = t * V; i < t * V + V; i++) if (logits[i] > most) most = logits[i];
      const right = logits[t * V + targets[t]];
      for (let i = t * V; i < t * V + V; i++) sum += logits[i] = Math.exp(logits[i] - most);
      loss += Math.log(sum) + most - right;
      for (let i = t * V; i < t * V + V; i++) logits[i] /= sum * n;
      logits[t * V + targets[t]] -= 1 / n;
    }
    return loss / n;
  }

  function gradients(c, W, ids, targets, B, T) {
    const { d_model: D, d_ff: F, num_heads: H, vocab_size: V } = c, n = B * T, { layers, x, last, logits } = forward(c, W, ids, B, T);
    const loss = surprise(logits, targets, V), G = {};
    for (const name in W) G[name] = zeros(W[name].length);
    const dlast = zeros(n * D);
    let dx = zeros(n * D);
    linearBack(logits, last.y, W["lm_head.weight"], dlast, G["lm_head.weight"], n, D, V);
    normBack(dlast, x, W["ln_final.weight"], last.inverse, dx, G["ln_final.weight"], n, D);
    for (let l = c.num_layers - 1; l >= 0; l--) {
      const a = layers[l], w = name => W[`layers.${l}.${name}.weight`], g = name => G[`layers.${l}.${name}.weight`];
      const dhidden = zeros(n * F), dsecond = zeros(n * D), dup = zeros(n * F);
      linearBack(dx, a.hidden, w("ffn.w2"), dhidden, g("ffn.w2"), n, F, D);
      for (let i = 0; i < dhidden.length; i++) {
        const gate = a.gate[i], sigmoid = 1 / (1 + Math.exp(-gate));
        dup[i] = dhidden[i] * gate * sigmoid;
        dhidden[i] *= a.up[i] * sigmoid * (1 + gate * (1 - sigmoid));
      }
      linearBack(dhidden, a.second.y, w("ffn.w1"), dsecond, g("ffn.w1"), n, D, F);
      linearBack(dup, a.second.y, w("ffn.w3"), dsecond, g("ffn.w3"), n, D, F);
      normBack(dsecond, a.middle, w("ln2"), a.second.inverse, dx, g("ln2"), n, D);
      const dout = zeros(n * D), dfirst = zeros(n * D), dq = zeros(n * D), dk = zeros(n * D), dv = zeros(n * D);
      linearBack(dx, a.out, w("attn.output_proj"), dout, g("attn.output_proj"), n, D, D);
      attendBack(dout, a.q, a.k, a.v, a.p, dq, dk, dv, H, D, B, T);
      rotate(dq, c, n, T, -1);
      rotate(dk, c, n, T, -1);
      for (const [name, d] of [["q", dq], ["k", dk], ["v", dv]]) linearBack(d, a.first.y, w(`attn.${name}_proj`), dfirst, g(`attn.${name}_proj`), n, D, D);
      normBack(dfirst, a.x, w("ln1"), a.first.inverse, dx, g("ln1"), n, D);
    }
    for (let t = 0; t < n; t++) for (let i = 0; i < D; i++) G["token_embeddings.weight"][ids[t] * D + i] += dx[t * D + i];
    return { loss, gradients: G };
  }

  function random(seed) { // mulberry32
    return () => {
      seed = seed + 0x6D2B79F5 | 0;
      let t = Math.imul(seed ^ seed >>> 15, 1 | seed);
      t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t;
      return ((t ^ t >>> 14) >>> 0) / 4294967296;
    };
  }

  function begin(c, dice) { // the book's initialization, from other dice
    const normal = () => {
      for (;;) {
        const z = Math.sqrt(-2 * Math.log(1 - dice())) * Math.cos(2 * Math.PI * dice());
        if (Math.abs(z) < 3) return z;
      }
    };
    const W = {}, { vocab_size: V, d_model: D, d_ff: F } = c, matrix = (name, m, d, deviation = Math.sqrt(2 / (m + d))) => {
      W[name + ".weight"] = zeros(m * d).map(() => deviation * normal());
    }, gain = name => { if (c.norm !== "none") W[name + ".weight"] = zeros(D).fill(1); };
    matrix("token_embeddings", V, D, 1);
    for (let l = 0; l < c.num_layers; l++) {
      for (const name of ["q_proj", "k_proj", "v_proj", "output_proj"]) matrix(`layers.${l}.attn.${name}`, D, D);
      for (const [name, m, d] of [["w1", F, D], ["w2", D, F], ["w3", F, D]]) matrix(`layers.${l}.ffn.${name}`, m, d);
      gain(`layers.${l}.ln1`);
      gain(`layers.${l}.ln2`);
    }
    gain("ln_final");
    matrix("lm_head", V, D);
    return W;
  }

  function rateAt(step, { lr, warmup_iters, cosine_cycle_iters }) {
    if (step < warmup_iters) return lr * step / warmup_iters;
    const share = (step - warmup_iters) / (cosine_cycle_iters - warmup_iters);
    return lr / 10 + .45 * lr * (1 + Math.cos(Math.PI * Math.min(1, share)));
  }

  // Clip to length 1, then a step of AdamW (0.9, 0.999, decay 1e-4); returns the length before.
  function update(W, G, state, step, rate) {
    let square = 0;
    for (const name in G) for (const g of G[name]) square += g * g;
    const length = Math.sqrt(square), shrink = Math.min(1, 1 / (length + 1e-6)), c1 = 1 - .9 ** step, c2 = 1 - .999 ** step;
    for (const name in W) {
      const w = W[name], g = G[name], { m, v } = state[name] ||= { m: zeros(w.length), v: zeros(w.length) };
      for (let i = 0; i < w.length; i++) {
        const slope = g[i] * shrink;
        m[i] += .1 * (slope - m[i]);
        v[i] += .001 * (slope * slope - v[i]);
        w[i] -= rate * (1e-4 * w[i] + m[i] / c1 / (Math.sqrt(v[i] / c2) + 1e-8));
      }
    }
    return length;
  }

  function tell(c, W, end, most, dice) { // at temperature 0.7
    const ids = [end];
    while (ids.length < most && (ids.length === 1 || ids.at(-1) !== end)) {
      const row = forward(c, W, ids, 1, ids.length).logits.slice(-c.vocab_size), top = row.reduce((a, b) => Math.max(a, b));
      const p = row.map(x => Math.exp((x - top) / .7));
      let left = dice() * p.reduce((a, b) => a + b), id = 0;
      while (id < c.vocab_size - 1 && (left -= p[id]) > 0) id++;
      ids.push(id);
    }
    return ids.slice(1);
  }

  function learn(c, tokens, valid, end, report) {
    const T = c.context_length, dice = random(1), W = begin(c, dice), state = {};
    const cut = (from, starts, shift) => Int32Array.from(starts.flatMap(at => [...from.subarray(at + shift, at + shift + T)]));
    const places = Array.from({ length: Math.floor((valid.length - 1) / T) }, (_, i) => i * T);
    const measure = () => surprise(forward(c, W, cut(valid, places, 0), places.length, T).logits, cut(valid, places, 1), c.vocab_size);
    for (let step = 1; step <= c.cosine_cycle_iters; step++) {
      const starts = Array.from({ length: c.batch_size }, () => Math.floor(dice() * (tokens.length - T)));
      const { loss, gradients: G } = gradients(c, W, cut(tokens, starts, 0), cut(tokens, starts, 1), c.batch_size, T);
      if (!Number.isFinite(loss)) return report({ step, died: true });
      update(W, G, state, step, rateAt(step, c));
      const look = step % c.eval_every === 0;
      report({ step, loss, ...(look ? { valid: measure(), said: tell(c, W, end, 40, random(step)) } : {}) });
    }
  }

  return { gradients, rateAt, update, learn };
}

// What Python packed: little-endian 16-bit numbers, compressed, in base64.
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const view = new DataView(await new Response(stream).arrayBuffer());
  return Int32Array.from({ length: view.byteLength / 2 }, (_, i) => view.getUint16(2 * i, true));
}

const STYLE = LOOK + `
.learn .told { font-style: italic; margin: .3em 0; overflow-wrap: anywhere; }
.learn .told b { font-style: normal; }
.learn svg { margin-top: 6px; }
`;

function render({ model, el }) {
  const floor = model.get("floor"), names = model.get("names"), base = model.get("config"), steps = base.cosine_cycle_iters;
  const SWITCHES = { "no warm-up": { warmup_iters: 0 }, "rate × 30": { lr: 30 * base.lr }, "no norm": { norm: "none" } };
  const runs = [];
  let width = 0, worker = null;
  const boxes = Object.keys(SWITCHES).map(name => h("input", { type: "checkbox", "data-switch": name }));
  const button = h("button", { type: "button", class: "main", onclick: () => worker ? stop("stopped") : begin() }, "▶ learn");
  const said = h("p", { class: "num", "aria-live": "polite" }, "The model has drawn its numbers and knows nothing."), told = h("div"), picture = s("svg", { role: "img" });
  const box = h("div", { class: "learn" });

  function stop(why) {
    worker.terminate();
    worker = null;
    button.textContent = "▶ learn again";
    said.textContent += " " + why[0].toUpperCase() + why.slice(1) + ".";
  }

  async function begin() {
    const broken = Object.keys(SWITCHES).filter((name, i) => boxes[i].checked);
    const config = Object.assign({ ...base }, ...broken.map(name => SWITCHES[name]));
    const run = { name: broken.join(", ") || "as it should be", losses: [], valid: [], died: 0 };
    const source = `onmessage = e => (${learner})().learn(...e.data, message => postMessage(message));`;
    const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    worker = new Worker(url);
    URL.revokeObjectURL(url);
    const mine = worker, began = performance.now();
    runs.push(run);
    said.textContent = "It begins.";
    told.replaceChildren();
    button.textContent = "■ stop";
    worker.onmessage = ({ data }) => {
      if (mine !== worker) return;
      const seconds = ((performance.now() - began) / 1000).toFixed(0);
      if (data.died) {
        run.died = data.step;
        said.textContent = `Step ${data.step}, ${seconds} s: the loss is no number any more.`;
        draw();
        return stop("it diverged");
      }
      run.losses.push(data.loss);
      if (data.valid) {
        run.valid.push([data.step, data.valid]);
        const last = data.said.map(id => names[id]).join("").replaceAll("<|endoftext|>", "").trim();
        told.append(h("p", { class: "told" }, h("b", {}, `step ${data.step}: `), last));
      }
      const now = run.valid.at(-1);
      said.textContent = `Step ${data.step} of ${steps}, ${seconds} s: loss ${data.loss.toFixed(2)}` + (now ? `, on unseen fables ${now[1].toFixed(2)}, ${(now[1] - floor).toFixed(2)} above the floor.` : ".");
      draw();
      if (data.step === steps) stop("done");
    };
    worker.onerror = e => { said.textContent = "The worker failed: " + e.message; stop("sorry"); };
    const numbers = [await unpack(model.get("tokens")), await unpack(model.get("valid"))];
    if (mine === worker) worker.postMessage([config, ...numbers, model.get("end")]);
  }

  function draw() {
    if (!width) return;
    const tall = 240, most = 10, x = step => 34 + (width - 44) * step / steps;
    const y = loss => 14 + (tall - 36) * (Math.log(most) - Math.log(Math.min(most, Math.max(loss, .18)))) / (Math.log(most) - Math.log(.18));
    const parts = [.5, 1, 2, 4, 8].flatMap(loss => [s("line", { class: "faint", x1: 34, x2: width - 10, y1: y(loss), y2: y(loss), "stroke-dasharray": "1 4" }),
      s("text", { x: 28, y: y(loss) + 4, "text-anchor": "end" }, String(loss))]);
    parts.push(s("line", { x1: 34, x2: width - 10, y1: y(floor), y2: y(floor), stroke: "var(--text)", "stroke-dasharray": "3 3" }),
      s("text", { x: width - 10, y: y(floor) - 5, "text-anchor": "end" }, `the floor, ${floor.toFixed(2)}: no model is better`));
    const uniform = Math.log(names.length);
    parts.push(s("line", { x1: 34, x2: width - 10, y1: y(uniform), y2: y(uniform), stroke: "var(--grey)", "stroke-dasharray": "3 3" }),
      s("text", { x: width - 10, y: y(uniform) - 5, "text-anchor": "end" }, `knowing nothing, ${uniform.toFixed(2)}`));
    for (const step of [0, steps / 2, steps]) parts.push(s("text", { x: Math.min(x(step), width - 24), y: tall - 4, "text-anchor": "middle" }, step ? String(step) : "step 0"));
    runs.forEach((run, i) => {
      const now = i === runs.length - 1, color = now ? "var(--warm)" : "var(--grey)";
      parts.push(s("polyline", { points: run.losses.map((loss, j) => `${x(j + 1).toFixed(1)},${y(loss).toFixed(1)}`).join(" "), fill: "none", stroke: color, "stroke-width": now ? 2 : 1.2 }));
      for (const [step, loss] of now ? run.valid : []) parts.push(s("circle", { cx: x(step), cy: y(loss), r: 4, fill: "var(--ink)" }));
      const at = run.died || run.losses.length, last = run.losses.at(-1);
      if (last && (now || at > 4)) parts.push(s("text", { x: Math.min(x(at), width - 70) + 6, y: y(last) + (now ? 16 : -6), style: `fill: ${color}; font-size: 12px` }, (run.died ? "× " : "") + (runs.length > 1 ? run.name : "")));
    });
    picture.setAttribute("viewBox", `0 0 ${width} ${tall}`);
    picture.setAttribute("aria-label", "loss against step, and the floor");
    picture.replaceChildren(...parts);
  }

  box.append(h("p", {}, h("b", {}, "Try it. "), "Press ", h("i", {}, "learn"), ": this page trains a Transformer, in less than a minute on most computers. Then break it. Which of the three switches will do the most harm? Say it first."),
    h("div", { class: "row" }, button, boxes.map((input, i) => h("label", {}, input, Object.keys(SWITCHES)[i]))), said, picture, told,
    h("p", { class: "note" }, model.get("note")));
  el.append(h("style", {}, STYLE), box);
  whenWide(picture.parentElement, now => { width = Math.min(now, 700); picture.style.maxWidth = width + "px"; draw(); });
}

export default { render, learner };
