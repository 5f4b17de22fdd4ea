"""python -m tinyldm "a prompt": draw pictures with a pipeline and save them.

Wrong input ends in one line, `error: ...`, and exit status 2; Ctrl-C in exit status 130, a closed
pipe in 141. Pictures are drawn and saved one by one, and a file is either whole or not there.
"""
import json
import math
import os
import shutil
import sys
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

from ..errors import TinyldmError, note
from ..pipelines.interpolation import ends
from .options import interpolates, jobs, parse

BUNDLED = "shapes"
ANIMATED = (".gif", ".webp")
LARGE = 4                   # times the weights' own number of pixels: worth a note
# Seconds per step; tqdm's own format switches to steps per second for fast steps.
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}, {rate_inv_fmt}]"
CLOCK = "{desc}: {elapsed_s:.1f} s"


def main(arguments=None):
    """Run the command with a list of arguments (None: the process's own) -> exit status."""
    shown = set()

    def show_warning(message, *_):                      # in one line, once, without the source
        if str(message) not in shown:
            from tqdm import tqdm  # which prints above its own progress bars
            tqdm.write(f"note: {message}", file=sys.stderr)
        shown.add(str(message))

    def run():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", UserWarning)
                warnings.showwarning = show_warning
                draw(parse(arguments))
        except MemoryError:
            raise TinyldmError("not enough memory: use --low-memory, or a smaller --width and "
                               "--height") from None
    return status(run)


def status(run):
    """Run a command -> exit status; what stops it is said in one line on standard error."""
    try:
        try:
            run()
        finally:
            sys.stdout.flush()                          # here, where an error can still be handled
    except TinyldmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:                             # the output's reader, such as head, left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141                                      # 128 + SIGPIPE, as in shells
    return 0


def draw(args):
    """Draw and save every picture and print its path; then print the profile, if asked for."""
    from ..images import check_output

    todo = jobs(args)
    paths = output_paths(args.output, len(todo))
    check_output(paths[0])
    for file in filter(None, (args.image, args.mask, args.to_image)):
        if any(path.exists() and path.samefile(file) for path in paths):
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
        if same := {*paths} & {*films}:
            raise TinyldmError(f"--animate and --output both name {min(same)}: name two files")
    if not args.profile:
        return draw_pictures(args, todo, paths, films)
    from .profiler import Profiler
    with Profiler() as profile:
        draw_pictures(args, todo, paths, films, profile)
    print(profile, file=sys.stderr)


def draw_pictures(args, todo, paths, films, profile=None):
    """Draw and save the pictures of the jobs `todo` under `paths`, and the animations `films`."""
    timed = profile.stage if profile else nullcontext
    with timed("loading"), stage("loading"):
        from ..images import save, to_pil
        from ..pipelines.request import Request
        from ..pipelines.stable_diffusion import load
        from .preview import Preview, half_blocks, save_film
        pipe = load(args.weights, args.device, args.dtype, args.low_memory, args.ema)
        for file, weight in args.lora:
            pipe.load_lora(file, weight)
        for file in args.embedding:
            pipe.load_textual_inversion(file)
        if args.steps is None:
            advise(pipe)
    if profile:
        profile.add(pipe)
    preview, frames, step_film = Preview(pipe), [], films and not interpolates(args)
    for job, path in zip(todo, paths):
        reading = "reading the prompt" + " and the picture" * (job.image is not None)
        with timed(reading), stage(reading):
            size = pipe.size(args.width, args.height, job.image)
            request = pipe.complete(Request(
                job.prompt, args.negative, args.steps, args.guidance, job.seed, *size,
                sampler=args.sampler, noise=args.noise, image=job.image, mask=job.mask,
                guidance_rescale=args.guidance_rescale, strength=args.strength,
                timestep_spacing=args.timestep_spacing, clip_skip=args.clip_skip))
            steps, sampler = request.num_inference_steps, request.sampler
            states = pipe.stream(**vars(request))
            if job.image and args.width is None and args.height is None:
                advise_on_size(pipe, size)
            edit = pipe.edit(job.image, request.strength, job.mask, sampler)
            own = request.timestep_spacing == pipe.schedule.timestep_spacing
            spacing = None if own else request.timestep_spacing
            text = parameters(args, job, request, size, edit, spacing)
        with timed("drawing"):
            for state in with_progress(states, steps, edit.steps_left_out(steps), sampler):
                step = state.step + 1
                wanted = args.preview and step % args.preview == 0
                early = preview(state.pred_x0) if wanted or step_film else None
                if step_film:
                    frames.append(early)
                if wanted:
                    save(early, path.with_name(f"{path.stem}-step{step}{path.suffix}"), text)
        with stage("decoding"):
            with timed("decoding"):
                image, = to_pil(pipe.decode(state.latents))
            with timed("saving"):
                save(image, path, text)
                if films:                               # the picture replaces the last step's frame
                    frames = [*(frames[:-1] if step_film else frames), image]
                    if step_film or job.weight == 1:
                        save_film(frames, films.pop(0), text)
                        frames = []
        if args.show:
            print(half_blocks(image, *shutil.get_terminal_size()), file=sys.stderr)
        print(path)


def advise(pipe):
    """A note if the number of steps is a default, but the scheduler is one for few steps."""
    from ..pipelines.stable_diffusion import STEPS

    config = pipe.scheduler
    if (pipe.num_inference_steps == STEPS and config.get("timestep_spacing") == "trailing"
            and not config.get("rescale_betas_zero_snr")):
        note("the scheduler is that of a model made for few steps, such as Turbo: if it is one, "
             f"--steps 1 --guidance 0 does better than {STEPS} steps")


def advise_on_size(pipe, size):
    """A note on a photograph that would take minutes per step."""
    if pipe.unet.settings.sample_size:
        own = pipe.size()
        times = math.prod(size) / math.prod(own)
        if times > LARGE:
            note(f"the image is drawn at its {size[0]}x{size[1]} pixels, {times:.0f} times as "
                 f"many as the {own[0]}x{own[1]} of the weights: --width and --height make it "
                 "smaller")


def with_progress(states, steps, left_out, sampler):
    """Pass on a stream's states, with a progress bar of the steps that are made."""
    made = steps - left_out
    # PNDM calls the model twice in its first step, Heun in all steps except the last: count once,
    # as diffusers does.
    again = {"pndm": range(steps > 1), "heun": range(1, 2 * made, 2)}.get(sampler, ())
    with progress("drawing", BAR, made) as bar:
        for state in states:
            yield state
            bar.update(state.step not in again)


def progress(name, bar_format, total):
    from tqdm import tqdm  # here, so that a wrong argument is reported at once
    return tqdm(desc=name, total=total, unit="step", bar_format=bar_format, file=sys.stderr)


@contextmanager
def stage(name):
    """Print the name of what is done inside, and afterwards how long it took."""
    with progress(name, CLOCK, 1) as bar:
        yield
        bar.update()


def parameters(args, job, request, size, edit, spacing):
    """How a picture was made, in the format that web interfaces store in PNG files and read."""
    lines = [str(ends(job.prompt)[0])]
    if args.negative:
        lines.append(f"Negative prompt: {args.negative}")
    loras = ", ".join(f"{Path(file).stem}:{weight:g}" for file, weight in args.lora)
    seed, *other_seed = ends(job.seed)
    values = {
        "Steps": request.num_inference_steps,
        "Sampler": request.sampler,
        "Timestep spacing": spacing,
        "CFG scale": f"{request.guidance_scale:g}",
        "CFG rescale": f"{args.guidance_rescale:g}" if args.guidance_rescale else None,
        "Clip skip": args.clip_skip,
        "Seed": seed,
        "Variation seed": other_seed[0] if other_seed else None,
        "Variation seed strength": f"{job.seed.weight:g}" if other_seed else None,
        "Size": f"{size[0]}x{size[1]}",
        "Model": Path(args.weights).resolve().name if args.weights else BUNDLED,
        "Noise": None if args.noise == "torch-cpu" else args.noise,
        "Lora": quoted(loras or None),
        "Embeddings": quoted(", ".join(Path(file).stem for file in args.embedding) or None),
        "Image": args.image and quoted(args.image.name),
        "Mask": args.mask and quoted(args.mask.name),
        "Denoising strength": f"{edit.strength:g}" if args.image else None,
        "To prompt": quoted(args.to_prompt),
        "To image": args.to_image and quoted(args.to_image.name),
        "On the way": f"{job.weight:g}" if interpolates(args) else None,
    }
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in values.items()
                                        if value is not None)])


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
