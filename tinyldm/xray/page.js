"use strict";
/* The x-ray's page, first part: the record's arrays, the maps made of them, and how a map is drawn.
   parts.js has what panels are made of; panels.js one build and one render function for each panel.

     arrays      what page.py has packed, by name
     state       what the reader has chosen; choose({...}) changes it and draws everything again
     mapOf(key)  a key such as "x_t|3" -> a grid of cells: their values, colours and formulas

   No library, no request: the page must open from file://, years from now. */

const facts = JSON.parse(document.getElementById("facts").textContent);
const arrays = {};

// ---- state ------------------------------------------------------------------------------------

const state = {
  step: Math.floor(0.3 * facts.steps.length),       // index into facts.steps; there most happens
  reader: firstReader(),            // index into facts.readers: the chosen word, or end, padding
  hover: null,                      // a reader under the pointer, shown while it is there
  layer: "", head: "",              // of the attention: "" means all of them, averaged; a layer is
                                    // an index into facts.layers, or a size such as 8×8
  scale: facts.guidance_scale ?? 1, // of panel 6 alone
  map: null, row: 0, column: 0,     // the cell that the numbers are about
  pinned: false,                    // whether the numbers stay in sight
};

function choose(changes) {
  Object.assign(state, changes);
  cache.clear();
  render();
}

/** What several panels need is computed once for each state. */
const cache = new Map();

function cached(key, make) {
  if (!cache.has(key)) cache.set(key, make());
  return cache.get(key);
}

/** The third word: in the bundled model's language a colour, elsewhere as good as any. */
function firstReader() {
  const words = facts.readers.flatMap((reader, i) => reader.kind === "word" ? [i] : []);
  return words[Math.min(2, words.length - 1)] ?? 0;
}

const shownReader = () => state.hover ?? state.reader;

// ---- arrays -----------------------------------------------------------------------------------

const TYPES = {float32: Float32Array, uint8: Uint8Array, int8: Int8Array};
const product = numbers => numbers.reduce((a, b) => a * b, 1);

async function unpackArrays() {
  const text = atob(document.getElementById("packed").textContent.trim());
  const bytes = Uint8Array.from(text, character => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  for (const [name, place] of Object.entries(facts.arrays)) arrays[name] = decoded(buffer, place);
}

function decoded(buffer, {dtype, shape, offset, scale}) {
  const raw = new TYPES[dtype](buffer, offset, product(shape));
  if (dtype !== "float32") {        // differences along the first axis; typed arrays wrap around
    const row = raw.length / shape[0];
    for (let i = row; i < raw.length; i++) raw[i] += raw[i - row];
  }
  const values = Float32Array.from(raw);
  if (scale) for (let i = 0; i < values.length; i++) values[i] *= scale[i % scale.length];
  return {shape, values};
}

/** An array at its first indices, as NumPy's array[i, j]: no copy. */
function part(name, ...indices) {
  let {shape, values} = arrays[name];
  for (const index of indices) {
    shape = shape.slice(1);
    const size = product(shape);
    values = values.subarray(index * size, (index + 1) * size);
  }
  return {shape, values};
}

// ---- latents: what is not packed is computed from x_t and the two predictions ------------------

const hasGuidance = () => "uncond" in arrays;

function blend(scale, step) {
  const cond = part("cond", step).values;
  if (!hasGuidance()) return cond;
  const uncond = part("uncond", step).values;
  return cond.map((value, i) => uncond[i] + scale * (value - uncond[i]));
}

/** x_start for a guidance scale. It is linear in the prediction, for noise, v and x_start alike. */
function xStart(scale, step) {
  const [a, b] = facts.linear[step], output = blend(scale, step);
  return part("x_t", step).values.map((value, i) => a * value + b * output[i]);
}

const LATENTS = {
  x_t: step => part("x_t", step).values,
  cond: step => blend(1, step),
  uncond: step => blend(0, step),
  model_output: step => blend(facts.guidance_scale ?? 1, step),
  x_start: step => arrays.x_start ? part("x_start", step).values
                                  : xStart(facts.guidance_scale ?? 1, step),
  guided: step => xStart(state.scale, step),
  without: step => xStart(0, step),
  with: step => xStart(1, step),
  difference: step => {
    const off = latent("without", step);
    return latent("with", step).map((value, i) => value - off[i]);
  },
  noise: step => {
    const [signal, spread] = scales(step), start = latent("x_start", step);
    return part("x_t", step).values.map((value, i) => (value - signal * start[i]) / spread);
  },
};

const latent = (name, step) => cached(`${name} ${step}`, () => LATENTS[name](step));

function scales(step) {
  const alphaBar = facts.alpha_bar[step];
  return [Math.sqrt(alphaBar), Math.sqrt(1 - alphaBar)];
}

// ---- maps -------------------------------------------------------------------------------------
/* A map is {h, w, what, value(i), colour(i), formula(i)}: cell i lies in row i / w. `value` is a number
   or, of a colour, three. */

const LATENT_NAMES = {
  x_t: "x_t", model_output: "the model's answer", noise: "predicted noise",
  x_start: "predicted x_start", guided: "x_start at your scale", difference: "what the prompt changes",
  without: "x_start without the prompt", with: "x_start with the prompt",
};

const FORMULAS = {
  x_t: (at, step) => {
    const [signal, spread] = scales(step);
    return `x_t = √ᾱ · x_start + √(1−ᾱ) · noise = ${n(signal)} · ${n(at("x_start"))} + `
      + `${n(spread)} · ${n(at("noise"))} = ${n(signal * at("x_start") + spread * at("noise"))}`;
  },
  model_output: at => !hasGuidance() ? "what the U-Net predicts" :
    `without + s · (with − without) = ${n(at("uncond"))} + ${n(facts.guidance_scale)} · `
      + `(${n(at("cond"))} − ${n(at("uncond"))}) = ${n(at("model_output"))}`,
  x_start: (at, step) => {
    const [a, b] = facts.linear[step];
    return `x_start = a · x_t + b · answer = ${n(a)} · ${n(at("x_t"))} + ${n(b)} · `
      + `${n(at("model_output"))} = ${n(at("x_start"))}; ${PREDICTION[facts.prediction_type] ?? ""}`;
  },
  noise: (at, step) => {
    const [signal, spread] = scales(step);
    return `noise = (x_t − √ᾱ · x_start) / √(1−ᾱ) = (${n(at("x_t"))} − ${n(signal)} · `
      + `${n(at("x_start"))}) / ${n(spread)} = ${n(at("noise"))}`;
  },
  guided: at => `without + s · (with − without) = ${n(at("without"))} + ${n(state.scale)} · `
    + `(${n(at("with"))} − ${n(at("without"))}) = ${n(at("guided"))}`,
  difference: at => `with − without = ${n(at("with"))} − ${n(at("without"))} = ${n(at("difference"))}`,
  without: () => "x_start of the prediction without the prompt",
  with: () => "x_start of the prediction with the prompt",
};

const PREDICTION = {
  v_prediction: "this model answers v, so a = √ᾱ and b = −√(1−ᾱ)",
  epsilon: "this model answers the noise, so a = 1/√ᾱ and b = −√(1−ᾱ)/√ᾱ",
  sample: "this model answers x_start itself, so a = 0 and b = 1",
};

const families = {
  latent(name, channel) {
    const [, h, w, C] = arrays.x_t.shape, values = latent(name, state.step);
    const at = i => other => latent(other, state.step)[i * C + +channel];
    return {
      h, w, what: `${LATENT_NAMES[name]}, channel ${+channel + 1}`,
      value: i => values[i * C + +channel],
      colour: i => signed(values[i * C + +channel] / 3),
      formula: i => FORMULAS[name](at(i), state.step),
    };
  },

  /** Latents as a picture, by the linear decoder. shift: at a later step, or at the first. */
  colours(name, shift = 0) {
    if (!arrays.decoder) return null;
    const step = shift === "first" ? 0 : Math.min(state.step + +shift, facts.steps.length - 1);
    const {h, w, values} = cached(`colours ${name} ${step}`, () => linearlyDecoded(latent(name, step)));
    const value = i => [...values.subarray(3 * i, 3 * i + 3)];
    return {
      h, w, value, colour: value, what: `${LATENT_NAMES[name]} as colours, by a linear decoder`,
      formula: () => `red, green, blue = bias + weight · the ${arrays.x_t.shape[3]} channels of 3 × 3 cells`,
    };
  },

  change() {
    const [, h, w, C] = arrays.x_t.shape, values = latent("difference", state.step);
    const size = i => Math.hypot(...values.subarray(i * C, (i + 1) * C));
    const most = largest(h * w, size);
    return {h, w, value: size, what: "size of what the prompt changes",
            colour: i => heat(size(i) / most),
            formula: () => `the norm over ${C} channels of x_start with − x_start without`};
  },

  picture(name, index) {
    const {shape: [h, w], values} = part(name, +(index ?? (name === "images" ? state.step : 0)));
    const value = i => [...values.subarray(3 * i, 3 * i + 3)];
    const what = {images: "x_start, decoded", picture: "the picture",
                  without: "the picture without the word"}[name];
    return {h, w, value, colour: value, what,
            formula: () => "the VAE's decoder; red, green, blue from 0 to 255"};
  },

  attention(layer, head) {
    const {h, w, values} = attentionMap(layer, head, shownReader());
    const most = largest(h * w, i => values[i]);
    return {
      h, w, value: i => values[i], what: `attention to “${textOf(shownReader())}”, ${layersText(layer)}, `
        + `${head === "" ? "all heads" : "head " + (+head + 1)}`,
      colour: i => heat(values[i] / most),
      formula: i => "softmax of q · k / √d over all tokens, so that they sum to 1; this cell reads: "
        + mostRead(layer, head, i),
    };
  },

  activation(index) {
    const block = facts.blocks[index], name = `activation/${block.name}`;
    const {shape: [h, w], values} = part(name, state.step);
    const most = facts.arrays[name].scale.map(scale => 127 * scale);
    const value = i => [...values.subarray(3 * i, 3 * i + 3)];
    return {
      h, w, value, what: `${block.name}, first three principal components`,
      colour: i => value(i).map((v, k) => 128 + 200 * v / most[k]),
      formula: () => `three sums over its ${block.shape[2]} channels, those that vary most over `
        + `all cells and steps; ${placeText(block.place)}`,
    };
  },

  /** One block for the whole U: its last attention. */
  u() {
    const index = facts.blocks.findLastIndex(block => block.kind === "Transformer2DModel");
    return index < 0 ? null : families.activation(index);
  },

  gradient(index) {
    const block = facts.blocks[index];
    const {shape: [h, w], values} = part(`gradient/${block.name}`, gradientIndex());
    const most = largest(h * w, i => values[i]);
    return {h, w, value: i => values[i], what: `gradient of ${facts.gradient_area} at ${block.name}`,
            colour: i => heat(values[i] / most),
            formula: () => `the norm over ${block.shape[2]} channels, by backward`};
  },

  effect(name) {
    const {shape: [h, w, R], values} = part(name, gradientIndex());
    const value = i => values[i * R + shownReader()], most = largest(h * w, value);
    return {h, w, value, what: `gradient for “${textOf(shownReader())}”`,
            colour: i => heat(value(i) / most),
            formula: () => "the norm of d(predicted x_start of this cell) / d("
              + (name === "word_gradient" ? "the vector that the U-Net reads)"
                                          : "the word's embedding, before the text encoder)")};
  },

  context() {
    if (!arrays.context) return null;
    const {shape: [h, w], values} = arrays.context;
    return {h, w, value: i => values[i], colour: i => signed(values[i] / 2),
            what: "the vectors that the U-Net reads, one row per word",
            formula: i => `the text encoder's output for “${textOf(Math.floor(i / w))}”, `
              + `number ${i % w + 1} of ${w}`};
  },

  /** The picture, lit by another map. */
  lit(...key) {
    const light = mapOf(key.join("|")), {shape: [, h, w], values} = arrays.picture;
    const most = largest(light.h * light.w, light.value);
    const cell = i => Math.floor(Math.floor(i / w) * light.h / h) * light.w
                      + Math.floor(i % w * light.w / w);
    const brightness = i => 0.12 + 0.88 * light.value(cell(i)) / most;
    return {h, w, what: `the picture, lit by ${light.what}`,
            value: i => light.value(cell(i)), formula: i => light.formula(cell(i)),
            colour: i => [0, 1, 2].map(k => values[3 * i + k] * brightness(i))};
  },
};

function mapOf(key) {
  const [family, ...rest] = key.split("|");
  return families[family](...rest);
}

// ---- attention --------------------------------------------------------------------------------

const mapSize = index => arrays[`attention/${facts.layers[index]}`].shape.slice(2, 4).join("×");
const mapSizes = () => [...new Set(facts.layers.map((_, i) => mapSize(i)))];

/** What state.layer stands for: the indices of one layer, of those of one size, or of all. */
function layersOf(layer) {
  const all = facts.layers.map((_, i) => i);
  return layer === "" ? all : `${layer}`.includes("×") ? all.filter(i => mapSize(i) === layer) : [+layer];
}

const layersText = layer => layer === "" ? "all layers"
  : `${layer}`.includes("×") ? `all layers of ${layer}` : layerName(facts.layers[layer]);

/** The size that shows words best, and that tinyldm.attention_maps averages: nearest to 8×8. */
const bestSize = () => mapSizes().sort((a, b) =>
  Math.abs(Math.log2(parseInt(a) / 8)) - Math.abs(Math.log2(parseInt(b) / 8)))[0] ?? "";

const attentionMap = (layer, head, reader) =>
  cached(`attention ${layer} ${head} ${reader}`, () => meanAttention(layer, head, reader));

/** Weights of a reader, averaged over the layers and heads that are left open. */
function meanAttention(layer, head, reader) {
  const layers = layersOf(layer);
  const shapes = layers.map(i => arrays[`attention/${facts.layers[i]}`].shape);
  const h = Math.max(...shapes.map(shape => shape[2])), w = Math.max(...shapes.map(shape => shape[3]));
  const values = new Float32Array(h * w);
  layers.forEach((index, k) => {
    const [, heads, rows, columns, R] = shapes[k];
    const weights = part(`attention/${facts.layers[index]}`, state.step).values;
    const chosen = head === "" ? [...Array(heads).keys()] : [Math.min(+head, heads - 1)];
    for (let i = 0; i < h * w; i++) {
      const cell = Math.floor(Math.floor(i / w) * rows / h) * columns + Math.floor(i % w * columns / w);
      for (const own of chosen)
        values[i] += weights[(own * rows * columns + cell) * R + reader] / chosen.length / layers.length;
    }
  });
  return {h, w, values};
}

function mostRead(layer, head, i) {
  return facts.readers
    .map((_, reader) => [attentionMap(layer, head, reader).values[i], textOf(reader)])
    .sort((a, b) => b[0] - a[0]).slice(0, 4)
    .map(([weight, text]) => `${text} ${n(weight)}`).join(", ");
}

const textOf = reader => {
  const {text, kind, tokens} = facts.readers[reader];
  return kind === "padding" ? `${tokens.length} × padding` : text;
};

/** down_blocks.0.attentions.1.transformer_blocks.0.attn2 -> down 0.1 */
const layerName = name => name.replace(".transformer_blocks.0.attn2", "").replace(".attentions", "")
  .replace(/_blocks?\./, " ");

/** Gradients are taken at a few steps: the index of the one nearest to the chosen step. */
function gradientIndex() {
  const step = facts.steps[state.step], far = facts.gradient_steps.map(own => Math.abs(own - step));
  return far.indexOf(Math.min(...far));
}

// ---- the linear decoder ----------------------------------------------------------------------

/** Latents -> {h, w, values}: the pixels of a cell are a linear function of 3 × 3 cells around it. */
function linearlyDecoded(latents) {
  const [, h, w, C] = arrays.x_t.shape, {shape: [, outputs], values: weight} = arrays.decoder;
  const f = Math.round(Math.sqrt(outputs / 3)), values = new Float32Array(f * h * f * w * 3);
  const bias = weight.subarray(9 * C * outputs), pixels = new Float32Array(outputs);
  for (let row = 0; row < h; row++) for (let column = 0; column < w; column++) {
    pixels.set(bias);
    for (let tap = 0; tap < 9; tap++) {
      const y = clamp(row + Math.floor(tap / 3) - 1, h), x = clamp(column + tap % 3 - 1, w);
      for (let c = 0; c < C; c++) {
        const value = latents[(y * w + x) * C + c], at = (tap * C + c) * outputs;
        for (let k = 0; k < outputs; k++) pixels[k] += value * weight[at + k];
      }
    }
    for (let k = 0; k < f; k++)     // a row of the cell's pixels at a time
      values.set(pixels.subarray(k * f * 3, (k + 1) * f * 3), ((row * f + k) * w * f + column * f) * 3);
  }
  return {h: f * h, w: f * w, values};
}

const clamp = (index, count) => Math.max(0, Math.min(count - 1, index));

// ---- drawing ----------------------------------------------------------------------------------

/** -1 to 1 -> blue over white to orange: both signs are told apart by the colour-blind, too. */
function signed(value) {
  const x = Math.max(-1, Math.min(1, value)), far = Math.abs(x);
  const end = x < 0 ? [24, 78, 160] : [190, 72, 10];
  return end.map(c => 246 + (c - 246) * far);
}

const HEAT = [[12, 8, 38], [88, 22, 110], [178, 50, 90], [240, 120, 40], [252, 250, 190]];

/** 0 to 1 -> dark to bright, in five colours of rising lightness. */
function heat(value) {
  const x = 4 * Math.max(0, Math.min(1, value || 0)), k = Math.min(3, Math.floor(x));
  return HEAT[k].map((c, i) => c + (x - k) * (HEAT[k + 1][i] - c));
}

function paint(canvas, map) {
  canvas.width = map.w;
  canvas.height = map.h;
  const context = canvas.getContext("2d"), image = context.createImageData(map.w, map.h);
  for (let i = 0; i < map.h * map.w; i++) {
    const [red, green, blue] = map.colour(i);
    image.data.set([red, green, blue, 255], 4 * i);
  }
  context.putImageData(image, 0, 0);
}

/** A canvas of a map, in a box that can hold frames over its cells. */
function canvasOf(key, options = {}) {
  const canvas = el("canvas", {role: "img", "data-map": key, ...options});
  return el("div", {class: "framed"}, canvas);
}

function drawMaps(root) {
  for (const canvas of root.querySelectorAll("canvas[data-map]")) {
    const key = canvas.dataset.map, map = mapOf(key);
    canvas.parentElement.hidden = !map;
    if (!map) continue;
    paint(canvas, map);
    canvas.setAttribute("aria-label", map.what);
    const rects = (canvas.dataset.cells ?? key) === state.map ? [cellRect()] : [];
    frames(canvas.parentElement, rects, "cell");
  }
}

function cellRect() {
  const {h, w} = mapOf(state.map);
  return [state.column / w, state.row / h, (state.column + 1) / w, (state.row + 1) / h];
}

/** Frames of one kind over a canvas; rects are [left, top, right, bottom] as shares of its sides. */
function frames(box, rects, kind) {
  box.querySelectorAll(`.frame.${kind}`).forEach(old => old.remove());
  for (const [left, top, right, bottom] of rects) {
    const frame = el("div", {class: `frame ${kind}`});
    Object.assign(frame.style, {left: percent(left), top: percent(top),
                                width: percent(right - left), height: percent(bottom - top)});
    box.append(frame);
  }
}

// ---- small things -----------------------------------------------------------------------------

const percent = share => `${100 * share}%`;

function largest(count, value) {
  let most = 1e-12;
  for (let i = 0; i < count; i++) most = Math.max(most, value(i));
  return most;
}

/** A number for people: three or four digits, and a true minus sign. */
function n(value) {
  const far = Math.abs(value);
  const text = far === 0 ? "0" : far >= 100 ? value.toFixed(0) : far >= 0.1 ? value.toFixed(3)
    : far >= 0.001 ? value.toFixed(4) : value.toExponential(2);
  return text.replace("-", "−");
}

/** Two digits, where there is little room. */
const brief = value => `${Number(value.toPrecision(2))}`.replace("-", "−");

const show = value => Array.isArray(value) ? value.map(n).join(", ") : n(value);
const placeText = ({file, line}) => `${file}, line ${line}`;

function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "circle", "text", "g"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
                      : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  element.append(...children);
  return element;
}
