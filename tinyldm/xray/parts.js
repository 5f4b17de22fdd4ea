/* The x-ray's page, second part: what panels are made of, such as buttons for words, the grid of
   attention, charts, and the U. */

// ---- controls and tables ------------------------------------------------------------------------

function grid(columns, ...children) {
  return el("div", {class: "cells", style: `grid-template-columns: repeat(${columns}, minmax(0, 1fr))`},
            ...children);
}

/** Buttons that choose a reader; while the pointer is over one, it is shown. */
function chips(readers, label) {
  return el("div", {class: "chips", role: "group", "aria-label": label}, ...readers.map(reader => {
    const {kind, tokens} = facts.readers[reader];
    return el("button", {
      type: "button", class: kind === "word" ? "" : "special", "data-reader": reader,
      title: kind === "padding" ? `tokens ${tokens[0]} to ${tokens.at(-1)}` : `token ${tokens.join(", ")}`,
      onclick: () => choose({reader, hover: null}),
      onpointerenter: event => { if (event.pointerType === "mouse") choose({hover: reader}); },
      onpointerleave: () => { if (state.hover !== null) choose({hover: null}); },
    }, textOf(reader));
  }));
}

function select(name, label, options, change = event => choose({[name]: event.target.value})) {
  return el("label", {class: "quiet"}, `${label} `, el("select", {name, onchange: change},
    ...options.map(([value, text]) => el("option", {value}, text))));
}

/** A legend: a strip of colours between two numbers. */
function scale(colour, from, to) {
  const canvas = el("canvas", {role: "img", "aria-label": `colours from ${from} to ${to}`});
  paint(canvas, {h: 1, w: 60, colour: i => colour(i / 59)});
  return el("div", {class: "scale quiet"}, from, canvas, to);
}

/** Layers by heads; a click chooses one. The two lists below the picture do the same by keyboard. */
function attentionGrid(layers, heads) {
  const columns = heads > 1 ? ["", ...[...Array(heads).keys()].map(String)] : [""];
  const title = head => head === "" ? "all" : `head ${+head + 1}`;
  const box = el("div", {class: "grid", "aria-hidden": "true", style:
    `grid-template-columns: minmax(64px, 130px) repeat(${columns.length}, minmax(0, 64px))`});
  box.append(el("span"), ...columns.map(head => el("span", {class: "label"}, title(head))));
  for (const [index, name] of layers) {
    box.append(el("span", {class: "label"}, name));
    for (const head of columns) {
      const options = {"data-layer": index, "data-head": head,
                       onclick: () => choose({layer: `${index}`, head})};
      box.append(canvasOf(`attention|${index}|${head}`, options));
    }
  }
  return box;
}

function sharesTable() {
  const share = value => `${(100 * value).toFixed(0)} %`;
  const rows = facts.boxes.flatMap((box, b) => box.words.map(word => el("tr", {"data-word": word},
    el("th", {scope: "row"}, facts.readers.find(reader => reader.word === word).text),
    el("td", {}, box.what),
    el("td", {class: "number"}, share(box.area)),
    el("td", {class: "number"}, share(facts.attention_share[word][b])),
    el("td", {class: "number"}, facts.gradient_share ? share(facts.gradient_share[word][b]) : ""))));
  const caption = "How much of a word's attention, and of its gradient through the text encoder, lies "
    + "inside its own object. More than the object's area: the word points there.";
  return el("div", {}, el("p", {class: "quiet"}, caption), el("table", {"aria-label": caption},
    el("thead", {}, el("tr", {}, ...["word", "its object", "area", "attention", "gradient"].map((text, i) =>
      el("th", {scope: "col", class: i > 1 ? "number" : ""}, text)))),
    el("tbody", {}, ...rows)));
}

/** A curve over the steps with a marker at the chosen one. values are drawn, shown are printed. */
function chart(root, title, values, shown = values) {
  const W = 300, H = 110, left = 8, top = 8, low = Math.min(...values), high = Math.max(...values);
  const x = i => left + (W - 2 * left) * i / Math.max(1, values.length - 1);
  const y = value => H - top - (H - 2 * top - 14) * (value - low) / (high - low || 1);
  const i = state.step;
  root.replaceChildren(el("h3", {}, title), el("svg", {
    class: "chart", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title}: ${n(shown[i])}`},
    el("line", {class: "axis", x1: left, x2: W - left, y1: H - top, y2: H - top}),
    el("path", {class: "curve", d: "M" + values.map((value, k) => `${x(k)} ${y(value)}`).join("L")}),
    el("line", {class: "marker", x1: x(i), x2: x(i), y1: top, y2: H - top}),
    el("circle", {class: "dot", cx: x(i), cy: y(values[i]), r: 4}),
    el("text", {x: Math.min(x(i) + 6, W - 60), y: top + 6}, n(shown[i]))));
}

/** R along the direction, with the tangent that backward claims. */
function slopeChart({claimed, measured, step, distances, responses}) {
  const W = 320, H = 180;
  // Without a curve, the two points that were measured lie on a line of the measured slope.
  const xs = distances ?? [-step, step], ys = responses ?? xs.map(x => measured * x);
  const far = Math.max(...xs.map(Math.abs)), middle = responses ? ys[Math.floor(ys.length / 2)] : 0;
  const high = Math.max(...ys.map(y => Math.abs(y - middle)), Math.abs(claimed) * far) || 1;
  const x = value => W / 2 + 0.44 * W * value / far, y = value => H / 2 - 0.42 * H * (value - middle) / high;
  return el("svg", {class: "chart", viewBox: `0 0 ${W} ${H}`, role: "img",
                    "aria-label": "the response along the direction, and its tangent"},
    el("line", {class: "axis", x1: 0, x2: W, y1: H / 2, y2: H / 2}),
    el("line", {class: "marker", x1: x(-far), x2: x(far), y1: y(middle - claimed * far),
                y2: y(middle + claimed * far)}),
    ...xs.map((own, i) => el("circle", {class: "point", cx: x(own), cy: y(ys[i]), r: 4})),
    el("text", {x: 6, y: 14}, "line: the claimed slope"), el("text", {x: 6, y: 28}, "points: measured"));
}

// ---- the U ------------------------------------------------------------------------------------

const KINDS = {Conv2d: "convolution", ResnetBlock2D: "resnet", Transformer2DModel: "attention",
               Downsample2D: "halve", Upsample2D: "double", GroupNormSiLU: "norm"};

/** Rows of the U: for each size of the map its way down and its way up, and the middle below. */
function levels() {
  const way = name => el("div", {class: `way ${name}`});
  const middle = facts.blocks.findIndex(block => block.name.startsWith("mid_block"));
  const rows = new Map(), bottom = way("middle");
  facts.blocks.forEach((block, index) => {
    const size = block.shape[0], up = middle >= 0 && index > middle ? 1 : 0;
    if (!rows.has(size)) rows.set(size, [way("down"), way("up")]);
    const place = block.name.startsWith("mid_block") ? bottom : rows.get(size)[up];
    place.append(blockCard(block, index));
  });
  rows.values().next().value[0].prepend(el("figure", {"data-block": "x_t", class: "block"},
    canvasOf("latent|x_t|0"), el("b", {}, "x_t"), el("span", {}, "channel 1")));
  return [...rows.values(), [bottom]];
}

function blockCard(block, index) {
  return el("figure", {"data-block": index, class: "block", title: `${block.name}: ${placeText(block.place)}`},
    canvasOf(`activation|${index}`), el("div", {class: "bar"}),
    el("b", {}, KINDS[block.kind] ?? block.kind),
    el("span", {}, block.shape.join("×")), el("span", {class: "stats"}));
}

/** Frames on the blocks that the chosen cell is computed from, and a sentence on the block. */
function showReads(root) {
  root.querySelectorAll(".framed").forEach(box => frames(box, [], "read"));
  const [family, index] = (state.map ?? "").split("|"), text = root.querySelector("[data-text]");
  if (family !== "activation" && family !== "gradient") {
    text.textContent = "Bars: the size of the gradient. Click a cell of a block.";
    return;
  }
  const block = facts.blocks[index], {h, w} = mapOf(state.map);
  for (const name of block.reads) {
    const other = name === "x_t" ? "x_t" : facts.blocks.findIndex(own => own.name === name);
    const size = name === "x_t" ? arrays.x_t.shape.slice(1) : facts.blocks[other].shape;
    const [top, bottom] = reach(block, state.row / h, 1 / h, size[0], 0);
    const [left, right] = reach(block, state.column / w, 1 / w, size[1], 1);
    frames(root.querySelector(`[data-block="${other}"] .framed`), [[left, top, right, bottom]], "read");
  }
  text.textContent = `${block.name}, a ${block.place.name}: ${placeText(block.place)}. It reads `
    + `${block.reads.join(" and the skip ")}; ${SEES[block.kind] ?? "the whole map"}.`;
}

const SEES = {
  Conv2d: "a 3×3 convolution sees the cell and its neighbours",
  ResnetBlock2D: "two 3×3 convolutions see 5×5 cells, and the norms the statistics of the whole map",
  Transformer2DModel: "attention sees every cell, and every token of the prompt",
  Downsample2D: "a 3×3 convolution with stride 2 sees 3×3 cells of the larger map",
  Upsample2D: "each cell is doubled, then a 3×3 convolution sees it and its neighbours",
  GroupNormSiLU: "it sees its own cell, and through the norm the statistics of the whole map",
};

/** Where a cell looks along one axis -> [from, to] as shares. start, one: the cell's own place and
    size as shares; cells: how many the block's input has along the axis. */
function reach({kind, shape}, start, one, cells, axis) {
  const own = shape[axis], first = Math.floor(start * own + 1e-6);
  const last = Math.max(first, Math.ceil((start + one) * own - 1e-6) - 1);
  const span = {
    Conv2d: [first - 1, last + 1], ResnetBlock2D: [first - 2, last + 2], GroupNormSiLU: [first, last],
    Downsample2D: [2 * first - 1, 2 * last + 1],
    Upsample2D: [Math.floor((first - 1) / 2), Math.floor((last + 1) / 2)],
  }[kind] ?? [0, cells - 1];
  return [Math.max(0, span[0]) / cells, Math.min(cells, span[1] + 1) / cells];
}
