// A story word by word under three readers; a click on a word shows what the model expected there and where it looked.
import { draw, loadModel, newDecoder, Reader, reshape, softmax } from "./model.js";

const CSS = `
.surprise .fable { font-family: Charter, "Bitstream Charter", Cambria, Georgia, serif; font-size: 16px; }
.surprise p { margin: 0 0 10px; line-height: 1.3; }
.tinylm .w { display: inline-flex; flex-direction: column; background: none !important; border: 0 !important; border-radius: 4px;
  padding: 2px !important; vertical-align: bottom; color: inherit; }
.tinylm .w:hover, .tinylm .w[aria-pressed="true"] { background: var(--soft) !important; color: inherit; }
.tinylm .w[aria-pressed="true"] { outline: 2px solid var(--warm); }
.surprise .bars { display: flex; height: 22px; align-items: flex-end; gap: 1px; }
.surprise .bars i { width: 5px; border-radius: 1px 1px 0 0; }
.surprise .panel { position: sticky; bottom: 0; background: var(--paper); border-top: 1px solid var(--line); padding-top: 8px;
  max-height: 60vh; overflow-y: auto; }
.surprise .panel:empty { display: none; }
.surprise .swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; }
.surprise .panes { display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: 4px 24px; }
.surprise .option { display: grid; grid-template-columns: 6.5em 1fr 3.5em; gap: 8px; align-items: center; line-height: 1.35; }
.surprise .option i { background: var(--ink); height: 9px; border-radius: 2px; min-width: 1px; }
.surprise .option.came { font-weight: 700; }
.surprise .option.came i { background: var(--warm); }
.surprise .option span:last-child { text-align: right; }
.surprise .heads { display: grid; grid-template-columns: auto repeat(4, 1fr); gap: 4px; align-items: center; margin: 4px 0; }
.surprise .heads button { padding: 2px 0; }
.surprise label[hidden] { display: none; }
.surprise .begin { flex: 1 1 260px; min-width: 0; }`;

const READERS = [["grammar", "the grammar, which cannot be beaten", "--green"], ["model", "the model of this book", "--ink"],
  ["one word back", "one who remembers a single word", "--warm"]];
const MOST = 400, SLICE = 12; // tokens of a told story; milliseconds of work between two pictures
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};
const nextPicture = () => new Promise(done => requestAnimationFrame(done));
const percent = p => p >= 0.0995 ? `${Math.round(100 * p)}%` : p >= 0.0005 ? `${(100 * p).toFixed(1)}%` : "<0.1%";
const shown = text => text.replace(/\n/g, "↵").trim() || "space";

class Text { // words with what each reader was surprised by, and the ids that the model reads
  constructor(words) { // rows of a text and the nats of the readers
    this.words = words.map(([text, ...nats]) => ({ text, nats, first: 0, last: 0 }));
    Object.assign(this, { ids: [], reads: [], decoder: newDecoder(), at: 0 });
  }

  cut(model, ids) { // say which tokens make which word
    this.reader ??= new Reader(model);
    for (const id of ids) {
      const place = this.ids.push(id) - 1;
      if (place < 2) continue; // <|endoftext|> and the line break before a story
      const piece = this.decoder.decode(new Uint8Array(model.tokenizer.bytes[id]), { stream: true });
      const word = this.growing;
      if (!word || (/^\s/.test(piece) && /\S/.test(word.seen))) {
        if (word) this.at++;
        if (this.at === this.words.length) this.words.push({ text: "", nats: [null, 0, null], made: true });
        this.growing = Object.assign(this.words[this.at], { seen: piece, first: place, last: place });
      } else {
        word.seen += piece;
        word.last = place;
      }
      if (this.growing.made) this.growing.text = this.growing.seen;
    }
  }

  readNext() { // one more token; adds to the model's surprise at its word
    const place = this.reads.length, id = this.ids[place];
    if (place > 1) {
      const word = this.words.find(({ first, last }) => first <= place && place <= last);
      const nats = -Math.log(softmax(Float64Array.from(this.reads[place - 1].logits))[id]);
      word.nats[1] = (place === word.first ? 0 : word.nats[1]) + nats;
    }
    this.reads.push(this.reader.read(id));
  }
}

export default {
  render({ model: given, el }) {
    const fable = new Text(given.get("words"));
    let text = fable, current = 0, chosen = null, head = null, telling = null, asked = 0;
    const legend = make("div", { class: "row note" }), story = make("div", { class: "fable", role: "group" });
    const panel = make("div", { class: "panel", role: "region", "aria-live": "polite", "aria-label": "The chosen word" });
    const begin = make("input", { class: "begin", "aria-label": "A beginning", value: given.get("begin"), maxlength: 300 });
    const tell = make("button", { class: "main" }, "Tell"), back = make("button", {}, "Back to the fable");
    const status = make("span", { class: "note num", role: "status" });
    const buttons = [], moments = given.get("training") ?? []; // of its training: step, and the model's nats at each word
    const slider = make("input", { type: "range", min: 0, max: moments.length, value: moments.length, "aria-label": "Moment of its training" });
    const step = make("span", { class: "num" }), training = make("label", { class: "note" }, "The model after", slider, step);

    function natsOf(at) { // what to show: the model of now, or of the moment that the slider says
      const { nats } = text.words[at], then = text === fable && moments[slider.value];
      return then ? [nats[0], then[1][at], nats[2]] : nats;
    }

    function drawWord(at) {
      const { text: said } = text.words[at], nats = natsOf(at);
      let button = buttons[at];
      if (!button) {
        if (!at || /\n/.test(said)) story.append(make("p"));
        button = buttons[at] = make("button", { class: "w", tabindex: at === current ? 0 : -1, "aria-pressed": "false" });
        button.onclick = () => choose(at);
        story.lastChild.append(button, " ");
      }
      const bars = make("span", { class: "bars", "aria-hidden": "true" });
      READERS.forEach(([name, , color], i) => {
        if (nats[i] != null && (nats[1] != null || i !== 1))
          bars.append(make("i", { "data-reader": name, style: `height:${Math.min(22, 1 + 3.5 * nats[i])}px;background:var(${color})` }));
      });
      button.replaceChildren(bars, said.trim());
      button.dataset.nats = nats.map(n => n?.toFixed(4)).join(" ");
    }

    function drawText() {
      buttons.length = 0;
      story.replaceChildren();
      story.setAttribute("aria-label", text === fable ? "A fable; arrow keys go from word to word" : "The told story");
      drawWords();
      panel.replaceChildren();
      back.hidden = text === fable;
      training.hidden = text !== fable || !moments.length;
    }

    function drawWords(until = text.words.length) {
      for (let at = 0; at < until; at++) drawWord(at);
      drawLegend();
    }

    function drawLegend() {
      const known = READERS.map((row, i) => [row, text.words.map((_, at) => natsOf(at)[i]).filter(n => n != null)]);
      step.textContent = moments[slider.value] ? `${moments[slider.value][0]} steps` : "all of its training";
      legend.replaceChildren("Surprise per word, in nats:", ...known.filter(([, nats]) => nats.length).map(([[, label, color], nats]) => {
        const mean = nats.reduce((a, b) => a + b, 0) / nats.length;
        return make("span", {}, make("i", { class: "swatch", style: `background:var(${color})` }), ` ${label}: `,
          make("b", { class: "num" }, mean.toFixed(2)));
      }));
    }

    async function choose(at) {
      const mine = ++asked, its = text;
      if (+slider.value < moments.length) { // what is looked into is the model of now
        slider.value = moments.length;
        drawWords();
      }
      buttons[current]?.setAttribute("tabindex", -1);
      buttons[chosen]?.setAttribute("aria-pressed", "false");
      if (chosen !== at) head = null;
      current = chosen = at;
      buttons[at].setAttribute("tabindex", 0);
      buttons[at].setAttribute("aria-pressed", "true");
      try {
        status.textContent = "fetching the model (0.9 MB)";
        const model = await loadModel();
        if (!its.ids.length) its.cut(model, model.tokenizer.encode("<|endoftext|>\n" + its.words.map(w => w.text).join("")));
        while (its.reads.length <= its.words[at].last && mine === asked) {
          status.textContent = `reading, token ${its.reads.length} of ${its.ids.length}`;
          for (const end = performance.now() + SLICE; its.reads.length <= its.words[at].last && performance.now() < end;) its.readNext();
          await nextPicture();
        }
        if (mine !== asked || its !== text) return;
        status.textContent = "";
        drawPanel(model);
      } catch (error) {
        status.textContent = `Sorry: ${error.message}.`;
      }
    }

    function drawPanel(model) {
      const word = text.words[chosen], { logits, attention } = text.reads[word.first - 1];
      const probs = softmax(Float64Array.from(logits)), bytes = id => shown(model.tokenizer.decode([id]));
      const order = Array.from(probs.keys()).sort((a, b) => probs[b] - probs[a]);
      const came = text.ids[word.first], best = order.slice(0, 6);
      if (!best.includes(came)) best.splice(5, 1, came);
      const options = best.map(id => make("div", { class: `option num${id === came ? " came" : ""}` },
        make("span", {}, bytes(id)), make("i", { style: `width:${100 * probs[id]}%` }), make("span", {}, percent(probs[id]))));
      const said = READERS.map(([name], i) => word.nats[i] == null ? "" : `${name} ${word.nats[i].toFixed(2)}`).filter(Boolean);
      const pieces = text.ids.slice(word.first, word.last + 1).map(bytes);
      const about = [`surprise in nats: ${said.join(", ")}. `, `For the model it was like one of `,
        make("b", {}, `${Math.exp(word.nats[1]).toFixed(word.nats[1] < 2 ? 1 : 0)}`), " equally likely words",
        pieces.length > 1 ? ` (it reads ${pieces.join(" + ")}).` : "."];

      const looks = attention.map(layer => layer.map(weights => { // the weight of each word, and of what stands before the story
        const shift = word.first - weights.length, sums = text.words.slice(0, chosen).map(({ first, last }) => {
          let sum = 0;
          for (let place = first; place <= last; place++) sum += weights[place - shift] ?? 0;
          return sum;
        });
        return { sums, before: shift ? 0 : weights[0] + (weights[1] ?? 0) };
      }));
      const far = ({ sums }) => Math.max(0, ...sums.slice(0, -2));
      head ??= looks.flatMap((layer, l) => layer.map((look, h) => [far(look), l, h])).reduce((a, b) => b[0] > a[0] ? b : a).slice(1);
      const heads = make("div", { class: "heads" }), where = make("div", { class: "note num" });
      looks.forEach((layer, l) => heads.append(`layer ${l + 1}`, ...layer.map((_, h) => {
        const button = make("button", { "aria-label": `layer ${l + 1}, head ${h + 1}` }, `${h + 1}`);
        button.onclick = () => { head = [l, h]; tint(); };
        return button;
      })));

      function tint() {
        const { sums, before } = looks[head[0]][head[1]];
        heads.querySelectorAll("button").forEach((button, i) =>
          button.setAttribute("aria-pressed", i === head[0] * looks[0].length + head[1]));
        buttons.forEach((button, at) => {
          const share = sums[at] ?? 0;
          if (share > 0.01) button.style.setProperty("background", `color-mix(in srgb, var(--violet) ${Math.round(10 + 45 * share)}%, transparent)`, "important");
          else button.style.removeProperty("background");
        });
        const top = sums.map((share, at) => [share, at]).sort((a, b) => b[0] - a[0]).slice(0, 4).filter(([share]) => share > 0.02);
        where.textContent = "It looks at " + [...top.map(([share, at]) => `${shown(text.words[at].text)} ${percent(share)}`),
          ...(before > 0.02 ? [`the start of the story ${percent(before)}`] : [])].join(", ") + ".";
      }
      panel.replaceChildren(
        make("div", {}, make("b", {}, `“${shown(word.text)}”`), " ", make("span", { class: "note num" }, ...about)),
        make("div", { class: "panes" },
          make("div", {}, make("div", { class: "note" }, "What the model expected here"), ...options),
          make("div", {}, make("div", { class: "note" }, "Where each head looked for it (violet in the story)"), heads, where)));
      tint();
      drawWords(chosen + 1);
      panel.scrollIntoView({ block: "nearest" });
    }

    slider.oninput = () => {
      panel.replaceChildren();
      drawWords();
    };

    story.onkeydown = event => {
      const step = { ArrowRight: 1, ArrowDown: 10, ArrowLeft: -1, ArrowUp: -10, Home: -Infinity, End: Infinity }[event.key];
      if (!step) return;
      event.preventDefault();
      buttons[current].setAttribute("tabindex", -1);
      current = Math.max(0, Math.min(buttons.length - 1, current + step));
      buttons[current].setAttribute("tabindex", 0);
      buttons[current].focus();
    };

    tell.onclick = async () => {
      if (telling) { telling.stop = true; return; }
      const mine = telling = { stop: false };
      tell.textContent = "Stop";
      asked++;
      try {
        status.textContent = "fetching the model (0.9 MB)";
        const model = await loadModel();
        const its = text = new Text([]);
        [current, chosen, head] = [0, null, null];
        drawText();
        its.cut(model, model.tokenizer.encode("<|endoftext|>\n" + begin.value.trim()));
        const end = model.tokenizer.special.get("<|endoftext|>"), began = performance.now(), prompt = its.ids.length;
        let drawn = 0, done = false;
        while (!done && !mine.stop) {
          for (const until = performance.now() + SLICE; performance.now() < until && !done && !mine.stop;) {
            while (its.reads.length < its.ids.length) its.readNext();
            const next = draw(reshape(its.reads.at(-1).logits, 0.8, 0, 0.9));
            done = next === end || its.ids.length - prompt === MOST;
            if (!done) its.cut(model, [next]);
          }
          for (drawn = Math.max(0, drawn - 1); drawn < its.words.length && its === text; drawn++) drawWord(drawn);
          const told = its.ids.length - prompt, seconds = (performance.now() - began) / 1000;
          status.textContent = `${told} tokens, ${Math.round(told / seconds)} a second`;
          status.dataset.rate = told / seconds;
          await nextPicture();
        }
        while (its.reads.length < its.ids.length) its.readNext();
        if (its === text) drawWords();
      } catch (error) {
        status.textContent = `Sorry: ${error.message}.`;
      }
      tell.textContent = "Tell";
      telling = null;
    };
    begin.onkeydown = event => { if (event.key === "Enter" && !telling) tell.onclick(); };
    back.onclick = () => {
      if (telling) telling.stop = true;
      asked++;
      text = fable;
      [current, chosen, head] = [0, null, null];
      status.textContent = "";
      drawText();
    };

    drawText();
    el.className = "surprise";
    el.append(make("style", {}, CSS), make("div", { class: "row" }, begin, tell, back, status), legend, training, story, panel);
  },
};
