// Elements of a page and of a picture, for the widgets.

function build(node, attributes, children) {
  for (const name in attributes)
    if (name.startsWith("on") || name === "value") node[name] = attributes[name];
    else if (attributes[name] !== false) node.setAttribute(name, attributes[name]);
  node.append(...children.flat());
  return node;
}

export function h(tag, attributes = {}, ...children) {
  return build(document.createElement(tag), attributes, children);
}

// An element of an SVG picture. The site turns pictures over in the dark; class as-is says that this one looks after itself.
export function s(tag, attributes = {}, ...children) {
  const own = tag === "svg" ? { class: "as-is", ...attributes } : attributes;
  return build(document.createElementNS("http://www.w3.org/2000/svg", tag), own, children);
}

// A slider with its name and its value, on a line.
export function dial(name, attributes, say, changed) {
  const told = h("output", { class: "num" });
  const input = h("input", { type: "range", "aria-label": name, ...attributes });
  const tell = () => { told.textContent = say(+input.value); input.setAttribute("aria-valuetext", told.textContent); };
  input.oninput = () => { tell(); changed(); };
  tell();
  return { input, tell, line: h("label", { class: "dial" }, h("span", {}, name), input, told), get value() { return +input.value; } };
}

// Call draw(width) whenever the box gets another width: text in pictures keeps its size.
export function whenWide(box, draw) {
  let width = 0;
  new ResizeObserver(() => {
    const now = Math.round(box.clientWidth);
    if (now > 0 && now !== width) draw(width = now);
  }).observe(box);
}

// Follow a pointer that went down on a node: moved(event) until it is let go.
export function dragging(node, begin, moved) {
  node.addEventListener("pointerdown", down => {
    down.preventDefault();
    begin(down);
    const end = () => { removeEventListener("pointermove", moved); removeEventListener("pointerup", end); removeEventListener("pointercancel", end); };
    addEventListener("pointermove", moved);
    addEventListener("pointerup", end);
    addEventListener("pointercancel", end);
  });
}

export const LOOK = `
.tinylm p { margin: 0 0 .6em; }
.tinylm svg { display: block; width: 100%; overflow: visible; user-select: none; -webkit-user-select: none; }
.tinylm svg text { fill: var(--text); font-size: 13px; }
.tinylm svg .faint { stroke: var(--grey); opacity: .6; fill: none; }
.tinylm .dial { display: grid; grid-template-columns: 7.5em minmax(0, 1fr) 5.5em; gap: 8px; align-items: center; width: 100%; }
.tinylm .dial input { width: 100%; min-width: 0; margin: 0; }
.tinylm .dial output { text-align: right; }
.tinylm table { border-collapse: collapse; margin: .4em 0; color: inherit; font-size: 14px; }
.tinylm :is(td, th) { padding: 2px 8px; text-align: right; border: 0; border-bottom: 1px solid var(--line); background: none; }
.tinylm :is(td, th):first-child { text-align: left; }
`;
