/* The x-ray's page, third part: the eight panels. Each has `needs` (why it may be left out), `build`
   (makes its elements, once) and `render` (what depends on the state). Maps draw themselves: see
   drawMaps in page.js. */

const body = panel => document.querySelector(`#${panel} .body`);
const wordIndex = reader => facts.readers[reader].word;         // undefined for end and padding

const panels = {
  machine: {
    needs: () => null,
    build(root) {
      const list = el("ol");
      if (!facts.readers.length) root.querySelectorAll(".text").forEach(part => part.remove());
      for (const link of document.querySelectorAll("#machine a[data-node]")) {
        const {dataset: {node, title}} = link, place = facts.nodes[node];
        if (!place) continue;       // a model of another kind: its code is not named here
        list.append(el("li", {}, el("b", {}, title), el("span", {class: "place"},
                                                       `${placeText(place)}: ${place.name}`)));
        const small = link.querySelector(".small").textContent;
        link.setAttribute("aria-label", `${title}, ${small}: ${placeText(place)}`);
      }
      root.querySelector(".columns").append(list);
    },
    render(root) {
      const word = root.querySelector("#machine-word");
      if (word) word.textContent = textOf(shownReader());
      for (const image of root.querySelectorAll("image[data-thumb]")) {
        const map = mapOf(image.dataset.thumb);
        if (!map) continue;
        const canvas = el("canvas");
        paint(canvas, map);
        image.setAttribute("href", canvas.toDataURL());
      }
    },
  },

  trajectory: {
    needs: () => null,
    build(root) {
      const channels = [...Array(arrays.x_t.shape[3]).keys()];
      const row = (name, text) => el("div", {}, el("h3", {}, text),
        grid(channels.length, ...channels.map(c => canvasOf(`latent|${name}|${c}`))));
      root.append(
        el("div", {class: "film", role: "group", "aria-label": "Predicted pictures by step"},
           ...facts.steps.map((step, i) => el("button", {
             type: "button", "aria-label": `Step ${step}`, onclick: () => choose({step: i})},
             el("canvas", {"data-film": i})))),
        el("div", {class: "columns"},
           el("figure", {}, canvasOf("picture|images"),
              el("figcaption", {}, "x_start, decoded: the picture as the model expects it now")),
           el("div", {class: "rows"},
              row("x_t", `x_t: the latents, ${channels.length} channels`),
              row("x_start", "predicted x_start"),
              row("noise", "predicted noise"),
              row("model_output", "the model's answer"),
              scale(x => signed(2 * x - 1), "−3", "3"))),
        el("div", {class: "charts"}, el("div", {"data-chart": "alpha"}), el("div", {"data-chart": "sigma"})));
      root.querySelectorAll("canvas[data-film]").forEach((canvas, i) => {
        const {shape: [h, w], values} = part("images", i);
        paint(canvas, {h, w, colour: k => values.subarray(3 * k, 3 * k + 3)});
      });
    },
    render(root) {
      root.querySelectorAll(".film button").forEach((button, i) =>
        button.setAttribute("aria-current", i === state.step));
      const sigmas = facts.alpha_bar.map(a => Math.sqrt((1 - a) / Math.max(a, 1e-6)));
      chart(root.querySelector("[data-chart=alpha]"), "alpha_bar: the share of signal in x_t",
            facts.alpha_bar);
      chart(root.querySelector("[data-chart=sigma]"),
            "log10 of sigma: noise in units of signal, √((1−ᾱ)/ᾱ)",
            sigmas.map(sigma => Math.log10(Math.max(sigma, 1e-3))), sigmas);
    },
  },

  words: {
    needs: () => facts.layers.length ? null : "attention",
    build(root) {
      const heads = arrays[`attention/${facts.layers[0]}`].shape[1];
      const sizes = mapSizes().map(size => [size, `all layers of ${size}`]);
      const layers = facts.layers.map((name, i) => [i, `${layerName(name)} (${mapSize(i)})`]);
      state.layer = bestSize();
      root.append(
        chips(facts.readers.map((_, i) => i), "Tokens; a word's tokens are taken together"),
        el("div", {class: "columns"},
           el("div", {},
              canvasOf("lit|attention||", {"data-lit": ""}),
              el("div", {class: "choices"},
                 select("layer", "Layer", [["", "all layers"], ...sizes, ...layers]),
                 select("head", "Head", [["", "all heads"], ...[...Array(heads).keys()].map(i =>
                   [i, `head ${i + 1}`])])),
              el("p", {class: "quiet", "aria-live": "polite", "data-text": ""})),
           el("div", {},
              attentionGrid([["", "all layers"], ...sizes, ...layers], heads),
              scale(heat, "0", "most"))));
    },
    render(root) {
      const cells = `attention|${state.layer}|${state.head}`, canvas = root.querySelector("[data-lit]");
      canvas.dataset.map = `lit|${cells}`;
      canvas.dataset.cells = cells;
      root.querySelectorAll("select").forEach(own => { own.value = state[own.name]; });
      root.querySelectorAll("canvas[data-layer]").forEach(own =>
        own.classList.toggle("here", own.dataset.layer === state.layer && own.dataset.head === state.head));
      const {h, w, values} = attentionMap(state.layer, state.head, shownReader());
      const share = values.reduce((a, b) => a + b, 0) / (h * w);
      root.querySelector("[data-text]").textContent =
        `“${textOf(shownReader())}” gets ${(100 * share).toFixed(1)} % of all attention here; `
        + `the most in one cell is ${n(largest(h * w, i => values[i]))}.`;
    },
  },

  meaning: {
    needs: () => "word_gradient" in arrays || "without" in arrays ? null : "word_gradient",
    build(root) {
      const attention = `attention|${bestSize()}|`;
      const views = [
        [`lit|${attention}`, attention, `Attention, ${layersText(bestSize())}`],
        ["lit|effect|word_gradient", "effect|word_gradient",
         "Gradient by the vector that the U-Net reads"],
        ["lit|effect|embedding_gradient", "effect|embedding_gradient",
         "Gradient by the word itself, through the text encoder"],
        ["picture|picture", "picture|picture", "The picture"],
        ["picture|without|0", "", "The picture without the word"]];
      const there = views.filter(([key]) => !key.includes("effect") || key.split("|")[2] in arrays)
                         .filter(([key]) => !key.includes("without") || "without" in arrays)
                         .filter(([key]) => !key.includes("attention") || facts.layers.length);
      root.append(el("div", {class: "cells"}, ...there.map(([key, cells, text]) => {
        const options = cells ? {"data-cells": cells} : {"data-without": ""};
        return el("figure", {}, canvasOf(key, options), el("figcaption", {}, text));
      })), el("p", {class: "quiet", "data-text": ""}));
      if (facts.attention_share) root.append(sharesTable());
    },
    render(root) {
      const word = wordIndex(state.reader), without = root.querySelector("[data-without]");
      if (without) {
        without.closest("figure").style.visibility = word === undefined ? "hidden" : "";
        without.dataset.map = without.dataset.cells = `picture|without|${word ?? 0}`;
        without.closest("figure").querySelector("figcaption").textContent =
          `The same noise, without “${textOf(state.reader)}”`;
      }
      const step = facts.gradient_steps[gradientIndex()];
      root.querySelector("[data-text]").textContent = facts.gradient_steps.length
        ? `Gradients are taken at step ${step}, the nearest of ${facts.gradient_steps.join(", ")}. `
          + "Dashed frames: the objects as the judge finds them in the picture." : "";
      root.querySelectorAll(".framed").forEach(box => frames(box, facts.boxes
        .filter(own => own.area < 0.5).map(own => own.edges), "area"));
      root.querySelectorAll("tr[data-word]").forEach(row =>
        row.classList.toggle("chosen", +row.dataset.word === word));
    },
  },

  unet: {
    needs: () => facts.blocks.length ? null : "activation",
    build(root) {
      root.append(
        select("shows", "Colours", [["activation", "what it computes"], ["gradient", "its gradient"]],
               () => choose({})),
        el("div", {class: "u"}, ...levels().flat()),
        el("p", {class: "quiet", "aria-live": "polite", "data-text": ""}));
      if (!("gradient" in facts.blocks[0])) root.querySelector("select").hidden = true;
    },
    render(root) {
      const shows = root.querySelector("select").value, g = gradientIndex();
      const most = Math.max(...facts.blocks.map(block => block.gradient?.[g] ?? 0));
      root.querySelectorAll("[data-block]").forEach(card => {
        const index = +card.dataset.block, block = facts.blocks[index];
        if (!block) return;
        card.querySelector("canvas").dataset.map = `${shows}|${index}`;
        card.querySelector(".stats").textContent =
          `mean ${brief(block.mean[state.step])}\nstd ${brief(block.std[state.step])}`
          + (block.gradient ? `\ngradient ${brief(block.gradient[g])}` : "");
        if (block.gradient) card.querySelector(".bar").style.width = percent(block.gradient[g] / most);
      });
      showReads(root);
    },
  },

  guidance: {
    needs: () => hasGuidance() && facts.is_linear && arrays.decoder ? null : "guidance",
    build(root) {
      const input = el("input", {type: "range", id: "scale", min: 0, max: 10, step: 0.1,
                                 "aria-label": "Guidance scale",
                                 oninput: event => choose({scale: +event.target.value})});
      const views = [["colours|without", "without: s = 0"], ["colours|with", "with: s = 1"],
                     ["change", "the difference, its size"], ["colours|guided", "at your scale"],
                     ["picture|images", `decoded by the VAE, at s = ${facts.guidance_scale}`]];
      root.append(
        el("div", {class: "row"}, el("label", {for: "scale"}, "s"), input,
           el("output", {for: "scale", id: "scale-text"})),
        el("div", {class: "cells"}, ...views.map(([key, text]) =>
          el("figure", {}, canvasOf(key), el("figcaption", {}, text)))),
        el("p", {class: "number", id: "guided-numbers"}),
        el("p", {class: "quiet"}, "The browser has no VAE. These pictures come from a linear decoder, "
           + "fitted to the later steps of this drawing, so at the first steps it exaggerates."));
    },
    render(root) {
      root.querySelector("#scale").value = state.scale;
      root.querySelector("#scale-text").textContent = state.scale.toFixed(1);
      const values = LATENTS.guided(state.step), colours = mapOf("colours|guided");
      const mean = values.reduce((a, b) => a + b, 0) / values.length;
      const std = Math.sqrt(values.reduce((a, b) => a + (b - mean) ** 2, 0) / values.length);
      const out = [...Array(colours.h * colours.w).keys()]
        .filter(i => colours.value(i).some(v => v < -8 || v > 263)).length;
      root.querySelector("#guided-numbers").textContent =
        `x_start(s) = without + s · (with − without):  mean ${n(mean)}, std ${n(std)}; `
        + `${(100 * out / colours.h / colours.w).toFixed(0)} % of the pixels are brighter or darker `
        + "than a screen can show.";
    },
  },

  gradient: {
    needs: () => facts.check ? null : "check",
    build(root) {
      const {claimed, measured, step} = facts.check;
      const error = Math.abs(claimed - measured) / Math.abs(measured);
      const row = (name, value) => el("tr", {}, el("th", {scope: "row"}, name),
                                      el("td", {class: "number"}, value));
      root.append(el("div", {class: "columns"},
        el("table", {}, el("tbody", {},
          row("claimed by backward", claimed.toPrecision(12)),
          row(`measured, ${step} to both sides`, measured.toPrecision(12)),
          row("relative difference", error.toExponential(1)))),
        slopeChart(facts.check)));
    },
    render() {},
  },

  numbers: {
    needs: () => null,
    build(root) {
      root.append(
        el("button", {id: "unpin", type: "button", "aria-label": "Let the numbers go",
                      onclick: () => choose({pinned: false})}, "×"),
        el("div", {class: "columns"},
           el("div", {"aria-live": "polite"},
              el("p", {}, el("b", {"data-what": ""}), " ", el("span", {class: "quiet", "data-where": ""})),
              el("p", {class: "value number", "data-value": ""}),
              el("p", {class: "number", "data-formula": ""}),
              select("cellmap", "Show", numberedMaps(), event => pick(event.target.value))),
           el("div", {class: "around", role: "group", "aria-label": "The cell and its neighbours"},
              ...[-1, 0, 1].flatMap(dy => [-1, 0, 1].map(dx => el("button", {
                type: "button", "data-dy": dy, "data-dx": dx,
                onclick: () => choose({row: state.row + dy, column: state.column + dx})}))))));
    },
    render(root) {
      const map = mapOf(state.map), i = state.row * map.w + state.column;
      const set = (name, text) => { root.querySelector(`[data-${name}]`).textContent = text; };
      root.closest("section").classList.toggle("pinned", state.pinned);
      set("what", map.what);
      set("where", `row ${state.row + 1} of ${map.h}, column ${state.column + 1} of ${map.w}, `
        + `step ${facts.steps[state.step]}`);
      set("value", show(map.value(i)));
      set("formula", map.formula(i));
      root.querySelector("select").value = state.map;
      root.querySelectorAll(".around button").forEach(button => {
        const row = state.row + +button.dataset.dy, column = state.column + +button.dataset.dx;
        const inside = row >= 0 && row < map.h && column >= 0 && column < map.w;
        button.disabled = !inside;
        button.setAttribute("aria-current", row === state.row && column === state.column);
        button.textContent = inside ? show(map.value(row * map.w + column)).replaceAll(", ", "\n") : "";
        button.setAttribute("aria-label", inside ? `row ${row + 1}, column ${column + 1}: `
          + button.textContent : "outside");
      });
    },
  },
};

// ---- numbers ----------------------------------------------------------------------------------

/** What the list of the numbers offers: for those who do not click. */
function numberedMaps() {
  const channels = [...Array(arrays.x_t.shape[3]).keys()];
  const latents = ["x_t", "x_start", "noise", "model_output", ...panels.guidance.needs() ? [] : ["guided"]];
  return [
    ...latents.flatMap(name => channels.map(c => `latent|${name}|${c}`)),
    "picture|images",
    ...facts.layers.length ? ["", ...mapSizes(), ...facts.layers.keys()].map(layer => `attention|${layer}|`) : [],
    ...facts.blocks.map((_, i) => `activation|${i}`),
  ].map(key => [key, mapOf(key).what]);
}

function pick(key) {
  const {h, w} = mapOf(key);
  choose({map: key, row: Math.floor(h / 2), column: Math.floor(w / 2)});
}

function cellUnder(event) {
  const canvas = event.target.closest("canvas[data-map]");
  if (!canvas || canvas.dataset.layer !== undefined) return;    // the grid chooses layers and heads
  const key = canvas.dataset.cells ?? canvas.dataset.map, {h, w} = mapOf(key);
  const box = canvas.getBoundingClientRect();
  const cell = (at, size, count) => Math.max(0, Math.min(count - 1, Math.floor(at / size * count)));
  choose({map: key, pinned: true, row: cell(event.clientY - box.top, box.height, h),
          column: cell(event.clientX - box.left, box.width, w)});
}

// ---- the whole --------------------------------------------------------------------------------

function render() {
  const {step} = state;
  document.getElementById("step").value = step;
  document.getElementById("step-text").textContent = `step ${facts.steps[step]} of ${facts.of_steps}, `
    + `t = ${facts.timesteps[step].toFixed(0)}, ᾱ = ${n(facts.alpha_bar[step])}`;
  document.querySelectorAll("[data-reader]").forEach(button =>
    button.setAttribute("aria-pressed", +button.dataset.reader === state.reader));
  for (const [name, panel] of Object.entries(panels)) {
    if (panel.needs()) continue;
    panel.render(body(name));
    drawMaps(body(name));
  }
}

function buildControls() {
  const slider = document.getElementById("step"), play = document.getElementById("play");
  slider.max = facts.steps.length - 1;
  slider.addEventListener("input", () => choose({step: +slider.value}));
  play.addEventListener("click", () => playing(play.getAttribute("aria-pressed") !== "true"));
  const words = facts.readers.flatMap((reader, i) => reader.kind === "word" ? [i] : []);
  document.getElementById("word-choice").replaceWith(
    Object.assign(chips(words, "The chosen word"), {id: "word-choice"}));
  document.getElementById("controls").hidden = false;
}

let timer = null;

function playing(on) {
  const play = document.getElementById("play");
  clearInterval(timer);
  play.setAttribute("aria-pressed", on);
  play.textContent = on ? "❚❚ Pause" : "▶ Play";
  if (on) timer = setInterval(() => choose({step: (state.step + 1) % facts.steps.length}), 250);
}

/** The arrow keys move the slider from anywhere, except where they have a use of their own. */
function arrowKeys(event) {
  const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (!move || event.target.closest("input, select") || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  choose({step: Math.max(0, Math.min(facts.steps.length - 1, state.step + move))});
}

function addPlaces() {
  for (const [panel, places] of Object.entries(facts.panels))
    document.getElementById(panel).append(el("p", {class: "place"}, "In the code: "
      + places.map(place => `${place.name} (${placeText(place)})`).join("; ")));
}

async function main() {
  await unpackArrays();
  const missing = [];
  buildControls();
  addPlaces();
  state.map = "latent|x_t|0";
  [state.row, state.column] = arrays.x_t.shape.slice(1, 3).map(side => Math.floor(side / 2));
  for (const [name, panel] of Object.entries(panels)) {
    if (panel.needs()) body(name).append(el("p", {class: "left-out"},
      `Left out: this drawing has no ${panel.needs()}. The end of the page says why.`));
    else panel.build(body(name));
  }
  const merged = facts.merged.join("; ");
  document.getElementById("merged").textContent = merged && `To keep the page small, ${merged}.`;
  if (facts.left_out.length) document.getElementById("left-out").append(
    el("h3", {}, "Left out"), el("ul", {}, ...facts.left_out.map(line => el("li", {}, line))));
  document.querySelector("main").addEventListener("click", cellUnder);
  document.addEventListener("keydown", arrowKeys);
  render();
  document.body.dataset.ready = "";
}

/** For the console, and for tests. */
window.xray = {facts, state, choose, mapOf, LATENTS, array: name => arrays[name]};

main().catch(error => {
  document.querySelector("main").prepend(el("p", {class: "warning"},
    `This browser cannot unpack the page (${error.message}). A browser of 2023 or later can.`));
  throw error;
});
