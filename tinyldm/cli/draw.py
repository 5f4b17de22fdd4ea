"""python -m tinyldm "a prompt": draw pictures with a pipeline and save them.

Wrong input ends in one line, `error: ...`, and exit status 2; Ctrl-C in exit status 130, a closed
pipe in 141: see console.py. Pictures are drawn and saved one by one, and a file is either whole or
not there. Under mpirun each rank draws its part of the pictures, the same as one process draws.
"""
import json
import math
import os
import re
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from .. import ranks
from ..errors import TinyldmError, note
from ..pipelines.interpolation import ends
from .console import notes, say, status
from .fields import check_meant
from .options import interpolates, jobs, parse, request
from .parameters import BUNDLED, number

LARGEST_SIDE = 16384        # pixels, of an enlarged picture
SHEET, GAP = 4096, 2        # pixels: the longest side of a contact sheet, between its pictures
ANIMATED = (".gif", ".webp")
# Seconds per step; tqdm's own format switches to steps per second for fast steps.
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}, {rate_inv_fmt}]"
CLOCK = "{desc}: {elapsed_s:.1f} s"


def main(arguments=None):
    """Run the command with a list of arguments (None: the process's own) -> exit status."""
    return status(lambda: run(arguments))


def run(arguments=None):
    """The same, with an exception for what stops it: see console.status."""
    try:
        with notes():
            draw(parse(arguments))
    except MemoryError:
        raise TinyldmError("not enough memory: use --low-memory, or a smaller --width and "
                           "--height") from None


def draw(args):
    """Draw and save every picture and print its path; then print the profile, if asked for."""
    from ..images import check_output
    from .preview import obstacle

    if args.show and (reason := obstacle()):
        note(f"--show has no place to draw: {reason}")
        args.show = False
    pipeline = pipeline_of(args)
    todo = jobs(args, pipeline)
    paths = output_paths(args.output, len(todo))
    check_output(paths[0])
    written = [*paths, *(output_paths(sheet_path(args.output), 1) if len(paths) > 1 else [])]
    for file in filter(None, (args.image, args.mask, args.to_image)):
        if any(path.exists() and path.samefile(file) for path in written):
            raise TinyldmError(f"--output would replace {file}, which is read: name another file")
    if args.preview is not None and args.preview < 1:
        raise TinyldmError(f"--preview must be at least 1 step, not {args.preview}")
    films = []
    if args.animate:
        if args.animate.suffix.lower() not in ANIMATED:
            raise TinyldmError(f"--animate must name a {' or '.join(ANIMATED)} file, "
                               f"not {args.animate}")
        # One film per prompt of its pictures, or one per picture of its steps.
        films = output_paths(args.animate, len(args.prompt) if interpolates(args) else len(todo))
        check_output(films[0])
        if same := {*written} & {*films}:
            raise TinyldmError(f"--animate and --output both name {min(same)}: name two files")
        if ranks.size() > 1 and interpolates(args):
            raise TinyldmError("an animation of several pictures is drawn by one process: leave "
                               "mpirun out")
    if not args.profile:
        return draw_pictures(args, todo, paths, films, pipeline)
    from .profiler import Profiler
    with Profiler() as profile:
        draw_pictures(args, todo, paths, films, pipeline, profile)
    print(profile, file=sys.stderr)


def pipeline_of(args):
    """The class of the weights' pipeline, which says what options there are.

    With a prompt, weights that are not on this machine are taken for Stable Diffusion's until they
    are loaded, so that wrong options are named before the hub is asked.
    """
    from ..checkpoints import kind_of
    from ..pipelines.loading import pipeline_class
    from ..pipelines.stable_diffusion import StableDiffusion

    here = args.weights is None or os.path.exists(os.path.expanduser(args.weights))
    if not here and (args.prompt or args.random) and args.label is args.noise_level is None:
        return StableDiffusion
    return pipeline_class(kind_of(args.weights))


def draw_pictures(args, todo, paths, films, pipeline, profile=None):
    """Draw and save the pictures of the jobs `todo` under `paths`, and the animations `films`.

    pipeline: the class that the options are checked for.
    """
    timed = profile.stage if profile else nullcontext
    with timed("loading"), stage("loading"):
        from ..images import grid, save
        from ..pipelines.loading import load
        from ..pipelines.preview import Preview
        from .preview import Live, save_film
        pipe = load(args.weights, args.device, args.dtype, args.low_memory, args.ema,
                    vae=args.vae, prediction_type=args.prediction_type)
        if type(pipe) is not pipeline:
            check_meant(args, type(pipe))
        for file, weight in args.lora:
            pipe.load_lora(file, weight)
        for file in args.embedding:
            pipe.load_textual_inversion(file)
        if args.steps is None:
            advise(pipe)
        for job in {job.label: job for job in todo}.values():   # a wrong one is found at once
            pipe.complete(request(job, args, type(pipe)))
    if profile:
        profile.add(pipe)
    picture = Picture(args, pipe, timed, Preview(pipe), Live() if args.show else None)
    thumbnails, frames, step_film, text = [], [], films and not interpolates(args), ""
    mine = slice(ranks.rank(), None, ranks.size())
    if step_film:
        films = films[mine]
    for job, path in zip(todo[mine], paths[mine]):
        if args.random:
            job = job._replace(prompt=random_prompt(pipe, job.seed))
        image, early, text = picture.draw(job, path, step_film)
        with timed("saving"):
            thumbnails.append(thumbnail(image, len(paths)))
            if films:                                   # the picture replaces the last step's frame
                frames = [*(early[:-1] if step_film else frames), image]
                if step_film or job.weight == 1:
                    save_film(frames, films.pop(0), text)
                    frames = []
        tell(path)
    parts = ranks.gather((thumbnails, text))
    ranks.leave_to_first()
    for i, path in enumerate(paths):
        if i % len(parts):                              # another rank has drawn it
            tell(path)
    if len(paths) > 1:
        thumbnails = [parts[i % len(parts)][0][i // len(parts)] for i in range(len(paths))]
        _, text = parts[(len(paths) - 1) % len(parts)]
        save(grid(thumbnails, columns(len(paths)), GAP), sheet_path(args.output), text)
        print(f"all on one sheet: {sheet_path(args.output)}", file=sys.stderr)


def tell(path):
    """Print a picture's path where programs read it; if that fails, where people do."""
    try:
        say(path, exact=True)
    except TinyldmError as error:
        print(f"note: {error}; the picture is there: {path}", file=sys.stderr)


def random_prompt(pipe, seed):
    if not pipe.language:
        raise TinyldmError("--random needs a model that names its language, such as the bundled "
                           "one: give a prompt")
    prompt = pipe.language.sentence(ends(seed)[0])
    print(f"prompt: {prompt}", file=sys.stderr)
    return prompt


class Picture(NamedTuple):
    """How to draw and save one picture after another."""

    args: Any
    pipe: Any
    timed: Any                                          # name -> a context that measures the time
    preview: Any
    live: Any                                           # None without --show

    def draw(self, job, path, step_film):
        """Draw and save a picture -> the image, the frames of a step_film, its parameters."""
        from ..images import save, to_pil
        from ..pipelines.progress import counted

        args, pipe = self.args, self.pipe
        frames = []
        read = ["the prompt"] * (job.prompt != "") + ["the picture"] * (job.image is not None)
        reading = f"reading {' and '.join(read)}"
        with self.timed(reading), stage(reading) if read else nullcontext():
            asked = pipe.complete(request(job, args, type(pipe)))
            size = pipe.picture_size(asked)
            check_scale(args.scale, size)
            states = pipe.states(asked)
            text = parameters(args, job, asked, size, pipe)
        with self.timed("drawing"):
            bar = progress("drawing", BAR, pipe.steps_made(asked))
            for state in counted(states, bar):
                step = state.step + 1
                wanted = args.preview and step % args.preview == 0
                if wanted or step_film or self.live:
                    early, = self.preview(state.pred_x0)
                if self.live:
                    self.live.show(early)
                if step_film:
                    frames.append(enlarged(early, args.scale))
                if wanted:
                    save(enlarged(early, args.scale),
                         path.with_name(f"{path.stem}-step{step}{path.suffix}"), text)
        with stage("decoding"):
            with self.timed("decoding"):
                image, = to_pil(pipe.decode(state.latents))
            with self.timed("saving"):
                save(enlarged(image, args.scale), path, text)
        if self.live:
            self.live.finish(image)
        return enlarged(image, args.scale), frames, text


def enlarged(image, scale):
    """A PIL image with every pixel scale x scale times as large."""
    return image.resize((image.width * scale, image.height * scale), 0) if scale > 1 else image


def columns(count):
    """Of a contact sheet: as many as rows, or one more."""
    return math.ceil(math.sqrt(count))


def thumbnail(image, count):
    """A PIL image, smaller where `count` of them would make a sheet larger than SHEET pixels."""
    most = max(SHEET // columns(count) - GAP, 1)
    if max(image.size) <= most:
        return image
    return image.resize([max(side * most // max(image.size), 1) for side in image.size])


def check_scale(scale, size):
    if scale > 1 and max(size) * scale > LARGEST_SIDE:
        raise TinyldmError(f"--scale {scale} would make a picture of {size[0]}x{size[1]} larger "
                           f"than {LARGEST_SIDE} pixels: take at most {LARGEST_SIDE // max(size)}")


def advise(pipe):
    """A note if the number of steps is a default, but the scheduler is one for few steps."""
    from ..pipelines.stable_diffusion import STEPS

    config = pipe.scheduler
    if (pipe.num_inference_steps == STEPS and config.get("timestep_spacing") == "trailing"
            and not config.get("rescale_betas_zero_snr")):
        note("the scheduler is that of a model made for few steps, such as Turbo: if it is one, "
             f"--steps 1 --guidance 0 does better than {STEPS} steps")


def progress(name, bar_format, total):
    from tqdm import tqdm  # here, so that a wrong argument is reported at once
    return tqdm(desc=name, total=total, unit="step", bar_format=bar_format, file=sys.stderr)


@contextmanager
def stage(name):
    """Print the name of what is done inside, and afterwards how long it took."""
    with progress(name, CLOCK, 1) as bar:
        yield
        bar.update()


def parameters(args, job, request, size, pipe):
    """How a picture was made, in the format that web interfaces store in PNG files and read."""
    own = request.timestep_spacing == pipe.schedule.timestep_spacing
    spacing = None if own else request.timestep_spacing
    guidance, strength, noise_level = (getattr(request, name, None) for name in
                                       ("guidance_scale", "strength", "noise_level"))
    lines = [str(ends(job.prompt)[0])] * (job.prompt != "")
    if args.negative:
        lines.append(f"Negative prompt: {args.negative}")
    loras = ", ".join(f"{Path(file).stem}:{number(weight)}" for file, weight in args.lora)
    seed, *other_seed = ends(job.seed)
    values = {
        "Steps": request.num_inference_steps,
        "Sampler": request.sampler,
        "Timestep spacing": spacing,
        "CFG scale": None if guidance is None else number(guidance),
        "CFG rescale": number(args.guidance_rescale) if args.guidance_rescale else None,
        # Web interfaces count the layer that is used, from the last one, which is 1.
        "Clip skip": None if args.clip_skip is None else args.clip_skip + 1,
        "Label": job.label if isinstance(job.label, int) else quoted(job.label),
        "Seed": seed,
        "Variation seed": other_seed[0] if other_seed else None,
        "Variation seed strength": number(job.seed.weight) if other_seed else None,
        "Size": f"{size[0]}x{size[1]}" if hasattr(request, "width") else None,
        "Scale": args.scale if args.scale > 1 else None,
        "Model": plain(Path(args.weights).resolve().name if args.weights else BUNDLED),
        "VAE": plain(Path(args.vae).resolve().name) if args.vae else None,
        "EMA": args.ema or None,
        "Prediction type": args.prediction_type,
        "Noise": None if args.noise == "torch-cpu" else args.noise,
        "Dtype": args.dtype,
        "Low memory": args.low_memory or None,
        "Lora": quoted(loras or None),
        "Embeddings": quoted(", ".join(Path(file).stem for file in args.embedding) or None),
        "Image": args.image and quoted(args.image.name),
        "Mask": args.mask and quoted(args.mask.name),
        "Denoising strength": None if strength is None else number(strength),
        "Noise level": noise_level,
        "To prompt": quoted(args.to_prompt),
        "To image": args.to_image and quoted(args.to_image.name),
        "On the way": number(job.weight) if interpolates(args) else None,
    }
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in values.items()
                                        if value is not None)])


def plain(text):
    """A name as it is, in quotes only where it could be misread."""
    return quoted(text) if re.search(r'[,:"\n]|^[\s{[]|\s$', text) else text


def quoted(text):
    """In quotes, so that a comma does not end it; None stays None."""
    return None if text is None else json.dumps(text, ensure_ascii=False)


# ---- files ----------------------------------------------------------------------------------

def output_paths(output, count):
    """One path per picture: out.png, or for several out-0.png, out-1.png, ..."""
    paths = [output]
    if count > 1 and not os.path.isdir(output):
        paths = [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(count)]
    for path in paths:
        if os.path.isdir(path):
            raise TinyldmError(f"cannot write {path}: it is a folder; name a file in it")
    return paths


def sheet_path(output):
    """Where all pictures together go: out.png -> out-sheet.png."""
    return output.with_name(f"{output.stem}-sheet{output.suffix}")
