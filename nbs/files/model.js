// The book's small model in the page: its tokenizer and its Transformer, as in chapters 00 to 03 and 07.

const PRETOKEN = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;

const toBytes = text => new TextEncoder().encode(text);
export const newDecoder = () => new TextDecoder("utf-8", { ignoreBOM: true });

export class Tokenizer {
  constructor(merges, special) {
    this.bytes = Array.from({ length: 256 }, (_, byte) => [byte]);
    this.ranks = new Map();
    for (const [a, b] of merges) {
      this.ranks.set(a * 65536 + b, this.bytes.length);
      this.bytes.push([...this.bytes[a], ...this.bytes[b]]);
    }
    this.special = new Map(special.map((name, i) => [name, this.bytes.length + i]));
    for (const name of special) this.bytes.push([...toBytes(name)]);
    const escaped = [...special].sort((a, b) => b.length - a.length).map(s => s.replace(/[^\w]/g, "\\$&"));
    this.cut = special.length ? new RegExp(`(${escaped.join("|")})`) : null;
  }

  encode(text) {
    text = newDecoder().decode(toBytes(text)); // a lone surrogate becomes U+FFFD
    return (this.cut ? text.split(this.cut) : [text]).flatMap(part =>
      this.special.get(part) ?? (part.match(PRETOKEN) ?? []).flatMap(word => this.merge(word)));
  }

  merge(word) {
    const ids = Array.from(toBytes(word));
    for (;;) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < ids.length; i++) {
        const made = this.ranks.get(ids[i] * 65536 + ids[i + 1]);
        if (made < best) [best, at] = [made, i];
      }
      if (at < 0) return ids;
      ids.splice(at, 2, best);
    }
  }

  decode(ids) {
    return newDecoder().decode(new Uint8Array(ids.flatMap(id => this.bytes[id])));
  }
}

function multiply(matrix, x, y) { // y = matrix x; the matrix row by row
  const width = x.length;
  for (let i = 0, at = 0; i < y.length; i++) {
    let sum = 0;
    for (let j = 0; j < width; j++) sum += matrix[at++] * x[j];
    y[i] = sum;
  }
  return y;
}

function normalize(x, gains) { // RMSNorm
  let squares = 0;
  for (const value of x) squares += value * value;
  const r = 1 / Math.sqrt(squares / x.length + 1e-5);
  return x.map((value, i) => value * r * gains[i]);
}

export function softmax(scores) {
  const most = scores.reduce((a, b) => Math.max(a, b));
  const e = scores.map(score => Math.exp(score - most)), sum = e.reduce((a, b) => a + b);
  return e.map(value => value / sum);
}

export class Model {
  constructor(buffer) { // a file of save_int8: a safetensors file, a byte a weight and a scale a row
    const size = Number(new DataView(buffer).getBigUint64(0, true));
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size)));
    const about = name => JSON.parse(header.__metadata__[name]);
    const read = name => {
      const { dtype, data_offsets: [start, end] } = header[name];
      const bytes = buffer.slice(8 + size + start, 8 + size + end);
      return dtype === "I8" ? new Int8Array(bytes) : new Float32Array(bytes);
    };
    const weight = name => {
      const numbers = read(`${name}.weight`), scale = header[`${name}.weight.scale`] && read(`${name}.weight.scale`);
      const width = numbers.length / (scale?.length ?? 1);
      return scale ? Float32Array.from(numbers, (q, i) => q * scale[Math.floor(i / width)]) : numbers;
    };
    this.config = about("config");
    this.tokenizer = new Tokenizer(about("merges"), about("special_tokens"));
    const parts = ["ln1", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "ln2", "ffn.w1", "ffn.w2", "ffn.w3"];
    this.layers = Array.from({ length: this.config.num_layers }, (_, i) =>
      Object.fromEntries(parts.map(part => [part.split(".").at(-1), weight(`layers.${i}.${part}`)])));
    for (const name of ["token_embeddings", "ln_final", "lm_head"]) this[name] = weight(name);
  }
}

export class Reader { // reads token after token, each once: it remembers keys and values
  constructor(model) {
    const { num_layers, context_length, d_model } = model.config;
    const memory = () => Array.from({ length: num_layers }, () => new Float32Array(context_length * d_model));
    Object.assign(this, { model, ids: [], length: 0, keys: memory(), values: memory() });
  }

  // Read an id; give the logits of what follows, each head's weights over what was read, and the stream behind each layer.
  read(id) {
    const most = this.model.config.context_length;
    this.ids.push(id);
    if (this.length === most) { // full: go on with the last half
      this.length = 0;
      for (const old of this.ids.slice(-1 - (most >> 1), -1)) this.step(old);
    }
    return this.step(id);
  }

  step(id) {
    const { config, layers, token_embeddings, ln_final, lm_head } = this.model;
    const width = config.d_model, size = width / config.num_heads, position = this.length++;
    let x = token_embeddings.slice(id * width, (id + 1) * width);
    const attention = [], stream = [];
    layers.forEach((layer, number) => {
      const keys = this.keys[number], values = this.values[number], heads = new Float32Array(width);
      const given = normalize(x, layer.ln1);
      const q = this.turn(multiply(layer.q_proj, given, new Float32Array(width)), position, size);
      keys.set(this.turn(multiply(layer.k_proj, given, new Float32Array(width)), position, size), position * width);
      values.set(multiply(layer.v_proj, given, new Float32Array(width)), position * width);
      attention.push([]);
      for (let start = 0; start < width; start += size) {
        const scores = new Float32Array(this.length);
        for (let t = 0; t < this.length; t++) {
          let sum = 0;
          for (let j = start, at = t * width + start; j < start + size; j++) sum += q[j] * keys[at++];
          scores[t] = sum / Math.sqrt(size);
        }
        const weights = softmax(scores);
        weights.forEach((weight, t) => {
          for (let j = start, at = t * width + start; j < start + size; j++) heads[j] += weight * values[at++];
        });
        attention[number].push(weights);
      }
      const seen = multiply(layer.output_proj, heads, new Float32Array(width));
      x = x.map((value, i) => value + seen[i]);
      const inner = normalize(x, layer.ln2), hidden = new Float32Array(config.d_ff);
      const gate = multiply(layer.w1, inner, new Float32Array(config.d_ff));
      multiply(layer.w3, inner, hidden).forEach((value, i) => { hidden[i] = value * gate[i] / (1 + Math.exp(-gate[i])); });
      const more = multiply(layer.w2, hidden, new Float32Array(width));
      x = x.map((value, i) => value + more[i]);
      stream.push(x);
    });
    const logits = multiply(lm_head, normalize(x, ln_final), new Float32Array(config.vocab_size));
    return { logits, attention, stream };
  }

  turn(x, position, size) { // RoPE: turn each pair of neighbors by its angle
    for (let i = 0; i < x.length; i += 2) {
      const angle = position * this.model.config.rope_theta ** (-(i % size) / size);
      const cos = Math.cos(angle), sin = Math.sin(angle), [a, b] = [x[i], x[i + 1]];
      x[i] = a * cos - b * sin;
      x[i + 1] = a * sin + b * cos;
    }
    return x;
  }
}

function weightsAddress() { // beside the pages on the site; in JupyterLab beside the notebook
  const lab = document.querySelector("#jupyter-config-data");
  if (!lab) return `${/\/nbs\/[^/]*$/.test(location.pathname) ? "../" : ""}tinylm/tinylm.safetensors`;
  const folder = /\/tree\/(.*\/)?[^/]*$/.exec(location.pathname)?.[1] ?? "";
  return `${JSON.parse(lab.textContent).baseUrl}files/${folder}files/tinylm.safetensors`;
}

let loading;
export function loadModel() { // once a script, when it is first needed
  const load = async () => {
    const response = await fetch(weightsAddress());
    if (!response.ok) throw new Error("the model's file was not found");
    return new Model(await response.arrayBuffer());
  };
  return loading ??= load().catch(error => { loading = undefined; throw error; });
}

// Temperature, then top-k, then top-p, as next_token_probs of chapter 07: probabilities, zero where nothing may be drawn.
export function reshape(logits, temperature = 1, topK = 0, topP = 1) {
  const order = Array.from(logits.keys()).sort((a, b) => logits[b] - logits[a]);
  const probs = softmax(Float64Array.from(logits, z => (z - logits[order[0]]) / Math.max(temperature, 1e-6)));
  const keep = topK ? order.slice(0, topK) : order, kept = new Float64Array(logits.length);
  const whole = keep.reduce((sum, id) => sum + probs[id], 0);
  let sum = 0;
  for (const id of keep) {
    if (sum >= topP * whole && sum > 0) break;
    sum += kept[id] = probs[id];
  }
  return kept.map(p => p / sum);
}

export function draw(probs, u = Math.random()) {
  let sum = 0;
  for (let id = 0; id < probs.length; id++) if ((sum += probs[id]) > u) return id;
  return probs.lastIndexOf(Math.max(...probs));
}
