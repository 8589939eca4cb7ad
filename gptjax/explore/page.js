"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

/** An element with attributes; `text` and `html` fill it, functions listen. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === false) continue;
    if (name === "text") element.textContent = value;
    else if (name === "html") element.innerHTML = value;
    else if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

// --- Numbers and colours ---

const LEAST = -17;
/** An error from its logarithm. */
function errorText(log) {
  if (log === null) return "";
  if (log <= -20) return "exact";
  return log > -2.5 ? Number((10 ** log).toPrecision(2)).toString() : `1e${Math.round(log)}`;
}
function errorSpoken(log) {
  return log === null ? "" : log <= -20 ? "exact" : `relative error ${(10 ** log).toExponential(1)}`;
}
const shape = (dims) => (dims.length ? dims.join(" × ") : "scalar");
const short = (x) => (x !== 0 && (Math.abs(x) < 0.01 || Math.abs(x) >= 1e4) ? x.toExponential(1) : Number(x.toPrecision(3)).toString());

let theme = {};
function readTheme() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["card", "ink", "forward", "backward"]) {
    const hex = style.getPropertyValue(`--${name}`).trim().slice(1);
    theme[name] = [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16));
  }
}
const mix = (a, b, part) => a.map((x, i) => Math.round(x + (b[i] - x) * part));
const css = (rgb) => `rgb(${rgb.join(" ")})`;
function luminance(rgb) {
  const [r, g, b] = rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
/** Paint an element's background, and its text so that it can be read. */
function paint(element, kind, part) {
  const rgb = mix(theme.card, theme[kind], part);
  element.style.background = css(rgb);
  element.style.color = luminance(rgb) > 0.179 ? "#000" : "#fff";
}
const between = (x, low, high) => Math.min(Math.max((x - low) / (high - low), 0), 1);
const severity = (log) => (log === null ? 0 : between(log, LEAST, 0));

/** Draw a picture a pixel a cell: positive cells in the accent, negative ones in the ink. */
function draw(canvas, picture, kind) {
  const bytes = Uint8Array.from(atob(picture.cells), (c) => c.charCodeAt(0));
  const cells = new Int8Array(bytes.buffer);
  canvas.width = picture.columns;
  canvas.height = picture.rows;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(picture.columns, picture.rows);
  const up = [], down = [];
  for (let i = 0; i <= 127; i++) {
    up.push(mix(theme.card, theme[kind], (i / 127) ** 0.6));
    down.push(mix(theme.card, theme.ink, (i / 127) ** 0.6));
  }
  cells.forEach((v, i) => {
    pixels.data.set(v < 0 ? down[-v] : up[v], 4 * i);
    pixels.data[4 * i + 3] = 255;
  });
  context.putImageData(pixels, 0, 0);
}

// --- Head ---

for (const [name, value] of Object.entries(data.facts)) {
  $("facts").append(make("div", {}, make("dt", { text: name }), make("dd", { text: value })));
}
$("made").textContent = data.made;
const visible = (token) => token.replace(/\n/g, "↵").replace(/\t/g, "⇥");

function showTokens() {
  const most = Math.max(...data.token_losses);
  $("tokens").replaceChildren(
    ...data.tokens.map((token, i) => {
      const loss = i ? data.token_losses[i - 1] : null;
      const item = make("li", { text: visible(token), title: loss === null ? "given" : `loss ${loss.toFixed(2)} nats` });
      paint(item, "forward", loss === null ? 0 : (0.75 * Math.max(loss, 0)) / most);
      return item;
    }),
  );
}

// --- The diagram ---

const chips = new Map();
const names = new Map(data.nodes.map((node) => [node.id, node]));
const title = (node) => data.lessons[node.op].title;
/** The weight of an op; of one without, the weight that made its only input. */
function label(node) {
  const source = node.sources.length === 1 ? names.get(node.sources[0]) : null;
  return node.weight || (source?.weight && node.op !== "classifier" ? `of ${source.weight}` : "");
}
const rowName = (row) => {
  const layer = data.nodes.find((node) => node.row === row).layer;
  return layer !== null && row > 0 ? `Layer ${layer}` : row === 0 ? "Embedding" : "Loss";
};
const rows = [...new Set(data.nodes.map((node) => node.row))].map((row) => ({
  row, name: rowName(row), nodes: data.nodes.filter((node) => node.row === row),
}));

function buildDiagram() {
  for (const { row, name, nodes } of rows) {
    const block = data.blocks.find((b) => b.layer === row - 1 && name.startsWith("Layer"));
    const heading = block
      ? make("h3", {}, make("button", { type: "button", "data-block": block.layer, text: name, click: () => open({ block }) }))
      : make("h3", {}, make("span", { text: name }));
    const columns = 1 + Math.max(...nodes.map((node) => node.column));
    const cols = make("div", { class: "cols", style: `--n: ${Math.max(columns, 8)}` });
    for (let column = 0; column < columns; column++) {
      const stack = nodes.filter((node) => node.column === column).map(chip);
      cols.append(make("div", { class: "col" }, ...stack));
    }
    cols.insertAdjacentHTML("beforeend", '<svg class="wires" aria-hidden="true"></svg>');
    $("diagram").append(make("section", { class: "row", "aria-label": name, "data-row": row }, heading, cols));
  }
}

function chip(node) {
  const button = make(
    "button",
    { type: "button", class: "chip", "data-id": node.id, click: () => open({ node }) },
    make("span", { class: "what", text: title(node) }),
    make("span", { class: "weight", text: label(node) }),
    node.result.length ? make("canvas", { class: "y", "aria-hidden": "true" }) : make("span", { class: "y scalar", text: data.loss.toFixed(3) }),
    make("canvas", { class: "dy", "aria-hidden": "true" }),
    make("span", { class: "error" }),
  );
  chips.set(node.id, button);
  return button;
}

/** The error of the gradient that an op receives; of the loss, which receives none, what it gives. */
const rightError = (node) => node.received ?? Math.max(...node.errors.map((e) => e.error), -20);

function paintChips() {
  for (const node of data.nodes) {
    const button = chips.get(node.id);
    const [y, dy] = [button.querySelector(".y"), button.querySelector(".dy")];
    if (node.result.length) draw(y, node.y, "forward");
    if (node.dy) draw(dy, node.dy, "backward");
    else dy.hidden = true;
    const log = fault && node.id in fault.received ? fault.received[node.id] : rightError(node);
    const hurt = fault !== null && log > Math.log10(data.tolerance);
    button.querySelector(".error").textContent = errorText(log);
    button.classList.toggle("hurt", hurt);
    button.classList.toggle("blamed", fault !== null && fault.blamed === node.id);
    const blamed = fault !== null && fault.blamed === node.id ? ", named by verify" : "";
    button.setAttribute("aria-label", `${title(node)} ${label(node)}, ${rowName(node.row)}: ${errorSpoken(log)}${blamed}`);
  }
}

/** Wires: forward lines between the activations, backward lines between the gradients. */
function drawWires() {
  const upright = matchMedia("(max-width: 820px)").matches;
  for (const element of document.querySelectorAll(".row")) {
    const { nodes, row } = rows.find((r) => String(r.row) === element.dataset.row);
    const cols = element.querySelector(".cols"), svg = element.querySelector("svg.wires");
    const origin = cols.getBoundingClientRect();
    const box = (id, part) => {
      const found = chips.get(id), rect = (part ? found.querySelector(part) : found).getBoundingClientRect();
      return { left: rect.left - origin.left, right: rect.right - origin.left, top: rect.top - origin.top, bottom: rect.bottom - origin.top,
        x: (rect.left + rect.right) / 2 - origin.left, y: (rect.top + rect.bottom) / 2 - origin.top };
    };
    const parts = [];
    const P = upright ? (main, cross) => [cross, main] : (main, cross) => [main, cross];
    // A wire that passes other ops runs straight along them, and bends where it arrives
    const wire = (kind, from, to, passes) => {
      const knee = passes ? [to[0] - 30, from[1]] : from;
      if (passes) line(kind, [from, knee]);
      line(kind, [knee, to], true);
    };
    const line = (kind, points, curve) => {
      const at = points.map(([m, c]) => P(m, c));
      const [a, z] = [at[0], at.at(-1)];
      const middle = P((points[0][0] + points.at(-1)[0]) / 2, 0);
      const d = curve
        ? upright ? `M${a}C${a[0]} ${middle[1]} ${z[0]} ${middle[1]} ${z}` : `M${a}C${middle[0]} ${a[1]} ${middle[0]} ${z[1]} ${z}`
        : `M${at.join("L")}`;
      parts.push(`<path class="${kind}" d="${d}"/>`);
    };
    const head = (kind, [m, c], dm, dc) => {
      const s = 4.5;
      const points = [[m, c], [m - dm * s - dc * s * 0.75, c - dc * s - dm * s * 0.75], [m - dm * s + dc * s * 0.75, c - dc * s + dm * s * 0.75]];
      parts.push(`<path class="${kind.toUpperCase()}" d="M${points.map(([a, b]) => P(a, b)).join("L")}Z"/>`);
    };
    // Between ops
    for (const node of nodes) {
      for (const source of node.sources.filter((id) => names.get(id).row === row)) {
        const from = box(source), to = box(node.id);
        const [start, end] = upright ? [from.bottom, to.top] : [from.right, to.left];
        const ends = (part, offset) => upright ? [from.x + offset, to.x + offset] : [box(source, part).y, box(node.id, part).y];
        const [f1, f2] = ends(".y", -6), hasGradient = names.get(source).dy !== null;
        const passes = node.column > names.get(source).column + 1;
        wire("f", [start, f1], [end - 2, f2], passes);
        head("f", [end, f2], 1, 0);
        if (hasGradient) {
          const part = node.dy ? ".dy" : ".y";
          const [b1] = ends(".dy", 6), [, b2] = ends(part, 6);
          const shift = node.dy || upright ? 0 : 8;
          wire("b", [start + 2, b1], [end, b2 + shift], passes);
          head("b", [start, b1], -1, 0);
        }
      }
    }
    // The residual stream
    const touching = nodes.filter((node) => node.reads_stream || node.writes_stream);
    const length = upright ? origin.height : origin.width;
    const rail = { f: 8, b: 18 };
    const first = row === 0 ? Math.min(...touching.map((n) => (upright ? box(n.id).y : box(n.id).x))) : 0;
    const lastReader = nodes.filter((n) => n.reads_stream).at(-1);
    const isLast = row === rows.at(-1).row;
    const final = isLast ? (upright ? box(lastReader.id).top : box(lastReader.id).x) : length;
    if (touching.length) {
      line("f", [[first, rail.f], [final - (isLast ? 6 : 3), rail.f]]);
      line("b", [[first + (row ? 3 : 6), rail.b], [final + (isLast ? 6 : 0), rail.b]]);
      if (!isLast) head("f", [final, rail.f], 1, 0);
      if (row) head("b", [first, rail.b], -1, 0);
    }
    for (const node of touching) {
      const b = box(node.id);
      const top = upright ? b.left : b.top;
      const middle = upright ? b.y : b.x;
      const column = nodes.filter((n) => n.column === node.column);
      if (column[0] !== node) continue;
      if (node.reads_stream) {
        line("f", [[middle - 6, rail.f], [middle - 6, top - 2]]);
        head("f", [middle - 6, top], 0, 1);
        line("b", [[middle + 6, top], [middle + 6, rail.b + 2]]);
        head("b", [middle + 6, rail.b], 0, -1);
      } else {
        line("f", [[middle + 6, top], [middle + 6, rail.f + 5]]);
        line("b", [[middle - 6, rail.b], [middle - 6, top - 2]]);
        head("b", [middle - 6, top], 0, 1);
        const [cx, cy] = P(middle + 6, rail.f);
        parts.push(`<circle cx="${cx}" cy="${cy}" r="5"/><path class="f" d="M${cx - 3} ${cy}h6M${cx} ${cy - 3}v6"/>`);
      }
    }
    svg.innerHTML = parts.join("");
  }
}

// --- An op, opened ---

let current = null;
const order = () => [...rows.flatMap(({ row, nodes, name }) => {
  const block = data.blocks.find((b) => b.layer === row - 1 && name.startsWith("Layer"));
  return [...(block ? [{ block }] : []), ...nodes.map((node) => ({ node }))];
})];
const same = (a, b) => a.node === b.node && a.block === b.block;

function figure(picture, kind, name) {
  const canvas = make("canvas", { role: "img", "aria-label": `${name}, ${shape(picture.shape)}` });
  draw(canvas, picture, kind);
  const T = data.tokens.length - 1, plot = make("div", { class: "plot" });
  if (picture.rows === T && picture.columns !== T) {
    canvas.style.height = `${13 * T}px`;
    plot.append(make("ol", { "aria-hidden": "true" }, ...data.tokens.slice(0, T).map((t) => make("li", { text: visible(t) }))));
  } else {
    plot.style.gridTemplateColumns = "1fr";
    canvas.style.aspectRatio = `${picture.columns} / ${Math.max(picture.rows, picture.columns / 3, 2)}`;
  }
  plot.append(canvas);
  const caption = make("figcaption", {}, make("b", { text: name }), ` ${shape(picture.shape)}, to ±${short(picture.largest)}, norm ${short(picture.norm)}`);
  return make("figure", { class: `fig ${kind}` }, caption, plot);
}

function bars(errors, what) {
  const body = errors.map(({ name, error }) => make("tr", {},
    make("th", { scope: "row", html: `<code>${name}</code>` }),
    make("td", { text: error <= -20 ? "exact" : (10 ** error).toExponential(1) }),
    make("td", {}, make("div", { class: "scale", role: "img", "aria-label": `${name}: ${errorSpoken(error)}` },
      make("i", { style: `width: ${100 * severity(error)}%` }), make("b", { style: `left: ${100 * severity(Math.log10(data.tolerance))}%` })))));
  return make("table", {}, make("thead", {}, make("tr", {}, ...["gradient", "error", what].map((t) => make("th", { scope: "col", text: t })))), make("tbody", {}, ...body));
}

function section(name, ...children) {
  return [make("h3", { text: name }), ...children];
}

function open(which) {
  current = which;
  const { node, block } = which;
  const subject = node ?? block, lesson = data.lessons[node ? node.op : "block"];
  $("op-title").textContent = node ? `${lesson.title} ${label(node)}`.trim() : `Layer ${block.layer}`;
  $("op-place").textContent = node ? rowName(node.row) : "A block, and the residual stream";
  const parts = [make("div", { class: "equation", html: lesson.text })];
  const pictures = subject.y.shape.length ? [figure(subject.y, "forward", node ? subject.y.name : "x, as it leaves the block")] : [];
  if (subject.dy) pictures.push(figure(subject.dy, "backward", node ? `${subject.dy.name}, received` : "dy, as it comes back"));
  for (const picture of subject.given) pictures.push(figure(picture, "backward", `${picture.name}, given`));
  parts.push(...section("On this text", make("div", { class: "figs" }, ...pictures)));
  if (node && node.heads.length) {
    parts.push(...section("Probabilities p: a row for each query, a column for each key",
      make("div", { class: "figs small" }, ...node.heads.map((p) => figure(p, "forward", p.name)))));
  }
  const code = (name, kind, source) => source
    ? make("div", { class: kind }, make("h4", { text: name }), make("pre", { class: "code", tabindex: "0", html: source })) : null;
  parts.push(...section("The code", make("div", { class: "pair" },
    code("Forward", "forward", lesson.forward), code(lesson.forward ? "Backward" : "Forward and backward", "backward", lesson.backward))));
  const errors = subject.received === undefined || subject.received === null ? subject.errors
    : [{ name: "dy, received", error: subject.received }, ...subject.errors];
  parts.push(...section("Error against jax.grad", make("div", { class: "scroll" }, bars(errors, "1e-17 to 1; the mark is what rounding explains")),
    make("p", { class: "note", html: "The gradient that the op <b>received</b> is compared with JAX's gradient of the whole network; those that it returns, with JAX's derivative of this op alone. Computed in float64 when this page was written." })));
  if (node) {
    const cells = (values) => make("tr", {}, make("th", { scope: "row", html: `<code>${values[0]}</code>` }), ...values.slice(1).map((t) => make("td", { text: t })));
    parts.push(...section("Shapes", make("div", { class: "scroll" }, make("table", {},
      make("thead", {}, make("tr", {}, ...["array", "shape", "axes"].map((t) => make("th", { scope: "col", text: t })))),
      make("tbody", {}, ...node.arguments.map((a) => cells([a.name, shape(a.shape), a.axes])), cells([node.y.name, shape(node.result), "the result"]),
        ...(node.saved.length ? [cells(["saved", node.saved.map(shape).join(", "), "for the backward"])] : []))))));
  }
  const tries = data.faults.filter((f) => f.op === (node ? node.op : "block"));
  if (tries.length) {
    parts.push(...section("Break it", make("div", { class: "tries" }, ...tries.map((f) => make("button", {
      type: "button", text: f.breaks, click: () => { $("op").close(); plant(f); $("network").scrollIntoView(); },
    })))));
  }
  $("op-body").replaceChildren(...parts);
  const all = order(), at = all.findIndex((w) => same(w, which));
  $("previous").disabled = at === 0;
  $("next").disabled = at === all.length - 1;
  if (!$("op").open) $("op").showModal();
  $("sheet").scrollTop = 0;
}

function step(by) {
  const all = order(), next = all[all.findIndex((w) => same(w, current)) + by];
  if (next) open(next);
}
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("close").addEventListener("click", () => $("op").close());
$("op").addEventListener("click", (event) => { if (event.target === $("op")) $("op").close(); });
$("op").addEventListener("keydown", (event) => {
  if (event.target.closest("pre, .scroll")) return;
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});

// --- Break it ---

let fault = null;

function buildFaults() {
  const radio = (value, text, small, checked) => make("label", {},
    make("input", { type: "radio", name: "fault", value, checked, change: () => plant(data.faults.find((f) => f.id === value) ?? null) }),
    make("span", { text }, ...(small ? [make("small", { text: small })] : [])));
  $("faults").append(radio("none", "Nothing: the code as it is", "", true));
  for (const op of new Set(data.faults.map((f) => f.op))) {
    $("faults").append(make("fieldset", {}, make("legend", { text: op.replaceAll("_", " ") }),
      ...data.faults.filter((f) => f.op === op).map((f) => radio(f.id, f.breaks, f.kind, false))));
  }
}

function plant(which) {
  fault = which;
  const chosen = document.querySelector(`#faults input[value="${CSS.escape(which ? which.id : "none")}"]`);
  chosen.checked = true;
  $("planted").hidden = which === null;
  if (which) $("planted").firstElementChild.textContent = `Planted in ${which.op.replaceAll("_", " ")}: ${which.breaks}.`;
  showFault();
  paintChips();
  requestAnimationFrame(drawWires);
}

function showFault() {
  const total = data.tensors.length;
  const figures = (pairs) => make("dl", { class: "figures" }, ...pairs.map(([name, value]) => make("div", {}, make("dt", { text: name }), make("dd", { text: value }))));
  if (!fault) {
    $("verdict").replaceChildren(make("p", { class: "says good" }, make("strong", { text: "verify: " }), data.verdict),
      figures([["tensors wrong", `0 of ${total}`], ["largest error", errorText(Math.max(...data.tensors.map((t) => t.error)))], ["rounding explains", errorText(Math.log10(data.tolerance))]]));
    $("change").replaceChildren();
  } else {
    $("verdict").replaceChildren(make("p", { class: "says" }, make("strong", { text: "verify: " }), fault.verdict),
      figures([["tensors wrong", `${fault.wrong} of ${total}`], ["error of the whole gradient", short(fault.error)], ["cosine to the right one", fault.cosine.toFixed(4)]]));
    const lines = fault.code.map(([mark, line]) => make({ "-": "del", "+": "ins" }[mark] ?? "span", { text: `${mark} ${line}` }));
    $("change").replaceChildren(make("pre", { class: "code diff", tabindex: "0", "aria-label": "The change" }, ...lines));
  }
  showHeat(fault ? fault.errors : data.tensors.map((t) => t.error));
}

function showHeat(errors) {
  const layers = [...new Set(data.tensors.map((t) => t.layer).filter((l) => l !== null))].sort((a, b) => a - b);
  const inside = [...new Set(data.tensors.filter((t) => t.layer !== null).map((t) => t.tensor))];
  const outside = data.tensors.filter((t) => t.layer === null).map((t) => t.tensor);
  const bound = Math.log10(data.tolerance);
  const cell = (tensor, layer) => {
    const i = data.tensors.findIndex((t) => t.tensor === tensor && t.layer === layer), log = errors[i], wrong = log > bound;
    const td = make("td", { text: errorText(log), class: wrong ? "wrong" : null, title: `${tensor}${layer === null ? "" : `[${layer}]`}: ${errorSpoken(log)}${wrong ? ", wrong" : ""}` });
    paint(td, "backward", wrong ? 0.2 + 0.8 * between(log, -5, 0) : 0.05);
    return td;
  };
  const table = (head, tensors, columns) => make("table", {},
    make("thead", {}, make("tr", {}, make("th", { scope: "col", text: "tensor" }), ...head.map((t) => make("th", { scope: "col", text: t })))),
    make("tbody", {}, ...tensors.map((tensor) => make("tr", {}, make("th", { scope: "row", text: tensor }), ...columns.map((layer) => cell(tensor, layer))))));
  $("heat").replaceChildren(make("div", { class: "tables" },
    table(layers.map((l) => `layer ${l}`), inside, layers), table(["outside"], outside, [null])));
  $("heat-note").textContent = fault
    ? "Relative L2 error against jax.grad. The backward starts at the loss, so the error spreads from its op down to the first layer."
    : "Relative L2 error against jax.grad, in float64: nothing but rounding.";
}

$("faults").addEventListener("submit", (event) => event.preventDefault());
$("mend").addEventListener("click", () => { plant(null); $("network").focus({ preventScroll: true }); });

// --- Light and dark ---

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = name === "dark" ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", `Switch to the ${name === "dark" ? "light" : "dark"} theme`);
  readTheme();
  showTokens();
  paintChips();
  showFault();
  if ($("op").open) open(current);
}
const dark = matchMedia("(prefers-color-scheme: dark)");
let chosen = false;
dark.addEventListener("change", () => { if (!chosen) setTheme(dark.matches ? "dark" : "light"); });
$("theme").addEventListener("click", () => {
  chosen = true;
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
});

buildDiagram();
buildFaults();
setTheme(dark.matches ? "dark" : "light");
drawWires();
new ResizeObserver(drawWires).observe($("diagram"));
