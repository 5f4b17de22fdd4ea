"""How a picture was drawn, as a text in its file: written, read, and turned into options.

    a prompt of any number of lines
    Negative prompt: the same
    Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7, Seed: 5, Size: 512x512

So tinyldm and the web interfaces store it in pictures, and so people paste it. Others store JSON:
ComfyUI its nodes, and InvokeAI, Fooocus or Easy Diffusion one object. `options` reads all of them.
"""
import json
import os
import re
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from .. import ranks
from ..errors import TinyldmError, note

BUNDLED = "shapes"
MOST_BYTES = 1 << 22                                    # of a pasted text
NAME = re.compile(r'\s*([^:,"\n]{1,60}?)\s*:\s*')
VALUE = re.compile(r'"(?:\\.|[^"\\])*"|[^,\n]*')
PAIR = re.compile(r"(.{1,255}?):(-?[\d.]+(?:e[+-]?\d+)?)(?:, |$)")     # of "ink:0.7, dots:1"
ONE_LINE = re.compile(r"(?<=\s)(?=Negative prompt:|Steps: *\d+\s*(?:,|$))")
TAG = re.compile(r"<(?:lora|lyco):([^:<>]+)((?::[^:<>]*)*)>", re.IGNORECASE)


def _fraction(text):
    if 0 <= float(text) <= 1:
        return float(text)
    raise ValueError(text)


def label(text):
    """A class's number, of some models any number, or else its name."""
    number = re.fullmatch(r"\s*(-?\d{1,20})(\.\d{1,20})?\s*", text, re.ASCII)
    return text if not number else float(text) if number[2] else int(text)


# What a text calls an option that takes the value as it is -> the option and its type.
OPTIONS = {
    "steps": ("steps", int), "cfg scale": ("guidance", float), "cfg": ("guidance", float),
    "guidance scale": ("guidance", float), "guidance": ("guidance", float),
    "cfg rescale": ("guidance_rescale", float), "seed": ("seed", int),
    "timestep spacing": ("timestep_spacing", str), "prediction type": ("prediction_type", str),
    "noise": ("noise", str), "scale": ("scale", int), "dtype": ("dtype", str),
    "variation seed": ("to_seed", int), "variation seed strength": ("on_the_way", _fraction),
    "to prompt": ("to_prompt", str), "on the way": ("on_the_way", _fraction),
    "noise level": ("noise_level", int),
}
# Of these a special rule makes options: see `_special`.
SPECIAL = ("sampler", "schedule type", "scheduler", "size", "clip skip", "rng", "low memory", "ema",
           "denoising strength", "lora", "label")
PICTURES = {"image": "image", "mask": "mask", "to image": "to_image"}
NAMED = {"model": "weights", "vae": "vae", "embeddings": "embedding"}    # whose places are unknown
# They change nothing, and need no note.
SILENT = ("version", "model hash", "vae hash", "hashes", "lora hashes", "ti hashes", "user",
          "created date", "civitai resources", "civitai metadata")
# Names in the JSON of other programs -> the same here.
JSON_NAMES = {"cfgscale": "CFG scale", "num inference steps": "Steps", "sampler name": "Sampler",
              "sampler": "Sampler"}
SERIES = ("to_prompt", "to_seed", "to_image", "on_the_way")
KNOWN = {*OPTIONS, *SPECIAL, *PICTURES, *NAMED, *SILENT}
# What web interfaces call torch's generators.
GENERATORS = {"cpu": "torch-cpu", "gpu": "torch-cuda", "nv": "torch-cuda"}


class Block(NamedTuple):
    """A text, taken apart. values: {name as written: text}."""

    prompt: str
    negative: str
    values: dict


def number(value):
    """A float as text: short, and exactly the same float when it is read."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


# ---- reading a text -------------------------------------------------------------------------

def read(text):
    """A pasted text, or the JSON of another program -> Block. Raises TinyldmError."""
    if text.lstrip()[:1] == "{":
        return read_object(text) or read_nodes(text)
    lines = [part for line in text.strip("\n\r").split("\n") for part in _lines(line)]
    lines[0] = re.sub(r"^\s*(?:positive )?prompt\s*:\s?", "", lines[0], flags=re.IGNORECASE)
    lines = [line.rstrip("\r") for line in lines]
    start, stop = _values_between(lines)
    values = {}
    for line in lines[start:stop]:
        values |= split_values(line)
    prompts = [[], []]
    for line in lines[:start]:
        marker = re.match(r"\s*negative prompt\s*:\s?", line, re.IGNORECASE)
        if marker and not prompts[1]:
            prompts[1].append(line[marker.end():])
        else:
            prompts[bool(prompts[1])].append(line)
    rest = " ".join(lines[stop:]).strip()
    if rest:
        values["the text after them"] = rest
    prompt, negative = ("\n".join(lines) for lines in prompts)
    return Block(prompt.strip("\n"), negative.strip("\n"), values)


def _lines(line):
    """A line as the several that it was, if it lost the line breaks before what is known."""
    if line.startswith("Steps"):
        return [line]
    *parts, last = ONE_LINE.split(line)
    return [*(part.rstrip() for part in parts if part.strip()), last]


def _values_between(lines):
    """The range of the lines that hold values: the last ones that do. Empty if there are none."""
    def names_of(line):
        return {name.lower() for name in split_values(line) or ()} & KNOWN

    stop = len(lines)
    while stop:
        names = names_of(lines[stop - 1])
        if "steps" in names and len(names) > 1:         # as programs write it: one line
            return stop - 1, stop
        start = stop
        while start and (more := names_of(lines[start - 1])):           # as people do: one per line
            names |= more
            start -= 1
        if "steps" in names or len(names) > 2:
            return start, stop
        stop = min(start, stop - 1)
    return len(lines), len(lines)


def split_values(line):
    """"Steps: 20, Model: "a, b"" -> {"Steps": "20", "Model": "a, b"}; None for another line."""
    values, at = {}, 0
    line = line.rstrip(" ,")
    while at < len(line):
        name = NAME.match(line, at)
        if not name:
            return None
        value, at = _value(line, name.end())
        if line[at:at + 1] not in ("", ","):
            return None
        values[name[1]] = value
        at += 1
    return values


def _value(line, at):
    """The value that begins there -> its text, and where it ends."""
    if line[at:at + 1] in ("[", "{"):                   # JSON, such as civitai's resources
        try:
            _, end = json.JSONDecoder().raw_decode(line, at)
            return line[at:end], end
        except (ValueError, RecursionError):
            pass
    text = VALUE.match(line, at)[0]
    end = at + len(text)
    if text.startswith('"') and len(text) > 1 and text.endswith('"'):
        try:
            text = json.loads(text, strict=False)
        except ValueError:
            text = text[1:-1]
    return text.strip() if line[at:at + 1] != '"' else text, end


def read_object(text):
    """The JSON object of InvokeAI, Fooocus, Easy Diffusion or SwarmUI -> Block, else None."""
    try:
        own = json.loads(text)
        own = own.get("sui_image_params", own)
        own = {name.replace("_", " "): value for name, value in own.items()}
    except (ValueError, AttributeError, RecursionError):
        return None
    prompt, negative = (next((own.pop(name) for name in names if isinstance(own.get(name), str)),
                             None) for names in (("positive prompt", "prompt"),
                                                 ("negative prompt", "negativeprompt")))
    if prompt is None:
        return None
    if "positive_prompt" in text and isinstance(own.get("clip skip"), int):
        own["clip skip"] += 1                           # InvokeAI counts as diffusers: see _layers
    values = {}
    for name, value in own.items():
        if value not in (None, "", [], {}) and name not in ("width", "height"):
            values[JSON_NAMES.get(name, name)] = (value if isinstance(value, str)
                                                  else json.dumps(value))
    if "Sampler" not in values and "scheduler" in values:           # InvokeAI's name of a sampler
        values["Sampler"] = values.pop("scheduler")
    if "width" in own and "height" in own:
        values["Size"] = f"{own['width']}x{own['height']}"
    elif size := re.findall(r"\d+", values.pop("resolution", "")):
        values["Size"] = "x".join(size)
    return Block(prompt, negative or "", values)


def read_nodes(text):
    """The JSON of ComfyUI's nodes -> Block. Raises TinyldmError unless one sampler draws them."""
    try:
        nodes = json.loads(text)
        sampler, = (node for node in nodes.values() if "KSampler" in node.get("class_type", "")
                    and isinstance(node["inputs"].get("positive"), list))
        inputs = sampler["inputs"]
        prompt, negative = (nodes[inputs[name][0]]["inputs"]["text"]
                            for name in ("positive", "negative"))
        latents = nodes[inputs["latent_image"][0]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sampler, prompt, negative, latents = None, None, None, {}
    if not (isinstance(prompt, str) and isinstance(negative, str)):
        raise TinyldmError("these parameters are JSON, but not of one simple sampler in ComfyUI, "
                           "and not one object with a prompt: give the prompt and the options")
    named = {"steps": "Steps", "cfg": "CFG scale", "seed": "Seed", "noise_seed": "Seed",
             "sampler_name": "Sampler"}
    values = {written: inputs[name] for name, written in named.items() if name in inputs}
    if inputs.get("scheduler") not in ("normal", None):
        values["Schedule type"] = inputs["scheduler"]
    if "EmptyLatent" in latents.get("class_type", ""):
        size = latents["inputs"]
        values["Size"] = f"{size.get('width')}x{size.get('height')}"
    else:
        values["latents from"] = latents.get("class_type")
    loras = []
    for node in nodes.values():
        own = node.get("inputs", {})
        if node.get("class_type") == "LoraLoader":
            loras.append(f"{Path(str(own.get('lora_name'))).stem}:{own.get('strength_model')}")
        elif "ckpt_name" in own:
            values["Model"] = own["ckpt_name"]
    if loras:
        values["Lora"] = ", ".join(loras)
    return Block(prompt, negative, {name: value if isinstance(value, str) else json.dumps(value)
                                    for name, value in values.items()})


# ---- from a text to options -----------------------------------------------------------------

def options(args):
    """What --like or --from-parameters says -> {option: default}; explicit options override it.

    args: the parsed arguments, with the options of the command alone. A note names what cannot be
    used. Raises TinyldmError for a source that cannot be read.
    """
    source, text = ranks.first(lambda: _source(args))
    block = read(text)
    found, unused = {"negative": block.negative}, {}
    if not args.random and block.prompt:
        found["prompt"] = [block.prompt]
    for name, value in block.values.items():
        key = name.lower()
        try:
            if key in OPTIONS:
                option, kind = OPTIONS[key]
                found[option] = kind(value)
            elif key not in KNOWN:
                unused[name] = value
        except ValueError:
            unused[name] = value
    _special(args, block.values, found, unused)
    asked = [args.count, args.variation, *(getattr(args, name) for name in SERIES)]
    if "on_the_way" not in found or any(value is not None for value in asked):
        for name in SERIES:                             # incomplete, or another series is asked for
            found.pop(name, None)
    known = {name: value for name, value in found.items() if hasattr(args, name)}
    unused |= {name: found[name] for name in found.keys() - known.keys()}
    if unused:
        named = ", ".join(f"{name}: {value}" for name, value in unused.items())
        note(f"of the parameters in {source} these are not used: {named}")
    return known


def _special(args, values, found, unused):
    """The options that need more than their text: add them to `found`, the others to `unused`."""
    lower = {name.lower(): (name, value) for name, value in values.items()}

    def leave(key, hint=""):
        name, value = lower[key]
        unused[name] = value + hint

    def take(key, convert):
        if key in lower:
            try:
                found.update(convert(lower[key][1]))
            except ValueError:                          # a TinyldmError is one
                leave(key)

    take("size", _size)
    take("clip skip", lambda text: {"clip_skip": _layers(int(text))})
    take("rng", lambda text: {"noise": GENERATORS.get(text.lower(), text)})
    take("label", lambda text: {"label": [label(text)]})
    take("low memory", lambda text: {"low_memory": text.lower() == "true"})
    take("ema", lambda text: {"ema": text.lower() == "true"})
    schedule = next((lower[key][1] for key in ("schedule type", "scheduler") if key in lower), "")
    take("sampler", lambda text: {"sampler": _sampler(text, schedule)})
    if schedule and "sampler" in lower and "sampler" not in found:      # no sampler with that one
        unused.pop(lower["sampler"][0])
        take("sampler", lambda text: {"sampler": _sampler(text, "")})
        leave("schedule type" if "schedule type" in lower else "scheduler")
    for key, option in NAMED.items():
        if key in lower and not getattr(args, option, None) and lower[key][1] != BUNDLED:
            leave(key, f" (--{option} names it)")
    for key, option in PICTURES.items():
        if key in lower and getattr(args, option) is None:
            found[option] = _beside(args.like, lower[key][1], option)
    if args.image or "image" in found:
        take("denoising strength", lambda text: {"strength": float(text)})
    elif "denoising strength" in lower:
        leave("denoising strength")
    if "lora" in lower and not args.lora:
        if args.lora_folder:
            found["lora"] = [(find_lora(args.lora_folder, name), float(weight))
                             for name, weight in PAIR.findall(lower["lora"][1])]
        else:
            leave("lora", " (--lora-folder names where they lie)")


def _source(args):
    """The text of --like or --from-parameters -> its name for messages, the text."""
    if args.like and args.from_parameters is not None:
        raise TinyldmError("--like and --from-parameters both give parameters: leave one out")
    if args.like:
        from ..images import read_parameters

        try:
            text = read_parameters(args.like)
        except TinyldmError as error:
            raise TinyldmError(f"{error}; --from-parameters reads a text") from None
        if text is None:
            raise TinyldmError(f"{args.like} does not say how it was drawn: name a PNG of "
                               "tinyldm, or a picture of a web interface")
        return args.like, text
    source = args.from_parameters
    if not source.strip():
        raise TinyldmError("--from-parameters is empty: give a file, - or a text")
    if "\n" in source or ONE_LINE.search(f" {source}"):         # no file: the text itself
        return "the text", source
    if "://" in source:
        raise TinyldmError(f"{source} is an address, not a file on this machine: download what is "
                           "there first, or paste the text")
    try:
        path = os.path.expanduser(source)
        with (sys.stdin.buffer if source == "-" else open(path, "rb")) as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES >> 20} MiB")
        text = text.decode("utf-8-sig")
    except (AttributeError, OSError, ValueError) as error:
        where = "standard input" if source == "-" else source
        raise TinyldmError(f"cannot read parameters from {where} "
                           f"({getattr(error, 'strerror', None) or error}): give a text in UTF-8; "
                           "--like reads a picture") from None
    if not text.strip():
        raise TinyldmError(f"{source} holds no parameters: paste a prompt and its parameters there")
    return "standard input" if source == "-" else source, text


def _size(text):
    width, height = re.split("[xX×]", text)
    return {"width": int(width), "height": int(height)}


def _layers(clip_skip):
    """Web interfaces count the layer that is used, from the last one, which is 1."""
    if clip_skip < 1:
        raise ValueError(clip_skip)
    return clip_skip - 1


def _sampler(name, schedule):
    """The name of a sampler, with its schedule of sigmas, which new web interfaces name apart."""
    from ..pipelines.request import find_sampler

    schedule = schedule.lower()
    plain = schedule in ("", "automatic", "normal", "uniform", "default", "ddim")
    if schedule == "automatic" and "++" in name:        # the web interface's own choice for these
        schedule, plain = "karras", False
    return find_sampler(name if plain else f"{name} {schedule}")


def _beside(picture, name, option):
    """The file of this name beside the picture that names it, or here. Raises TinyldmError."""
    name = Path(name).name
    folders = [*([picture.parent] if picture else []), Path()]
    for folder in folders:
        if name and (folder / name).is_file():
            return folder / name
    raise TinyldmError(f"the parameters name the picture {name}, which is not here: give "
                       f"--{option.replace('_', '-')}")


# ---- LoRAs by their names -------------------------------------------------------------------

def split_tags(prompt):
    """"a cat <lora:ink:0.7>" -> "a cat ", [("ink", 0.7)]. Raises TinyldmError for a wrong weight.
    """
    found = []
    for name, weights in TAG.findall(prompt):
        weight = weights.split(":")[1] if weights else ""
        try:
            found.append((name.strip(), float(weight or 1)))
        except ValueError:
            raise TinyldmError(f"<lora:{name}{weights}> must be <lora:NAME:WEIGHT>, the weight a "
                               "number") from None
    return TAG.sub("", prompt), found


def find_lora(folder, name):
    """The file NAME.safetensors in a folder or below it, in small or capital letters alike.

    Raises TinyldmError, with names that are near, if there is none.
    """
    files = sorted(Path(folder).rglob("*.safetensors"))
    named = [file for file in files if file.stem.lower() == name.lower()]
    if not named:
        near = get_close_matches(name, [file.stem for file in files], 3, 0.4)
        raise TinyldmError(f"{folder} holds no LoRA {name}.safetensors: "
                           + (f"near are {', '.join(near)}" if near else
                              f"it holds {len(files)} .safetensors files of other names"))
    return next((file for file in named if file.stem == name), named[0])


def with_loras(args, prompts):
    """Prompts without their tags, whose LoRAs of --lora-folder are added to args.lora.

    Raises TinyldmError for prompts with different tags: a LoRA changes the weights for all.
    """
    prompts, tags = zip(*map(split_tags, prompts))
    if any(other != tags[0] for other in tags):
        raise TinyldmError("the prompts name different LoRAs: draw them one after another")
    args.lora = args.lora + [(find_lora(args.lora_folder, name), weight)
                             for name, weight in tags[0]]
    return list(prompts)
