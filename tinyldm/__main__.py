"""python -m tinyldm "a prompt": the command line over pipeline.py.

What a person may get wrong ends in one line, `error: ...`, and exit status 2; Ctrl-C in exit
status 130, a closed pipe in 141. A picture is drawn, written under a temporary name and moved into
place, one by one.
"""
import argparse
import json
import os
import shutil
import sys
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

from .errors import TinyldmError
from .files import replacing, temporary_beside

BUNDLED = "shapes"
ANIMATED = (".gif", ".webp")
# The time a step takes; tqdm's own format switches to steps a second where they are quick.
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}, {rate_inv_fmt}]"
CLOCK = "{desc}: {elapsed_s:.1f} s"


def main(arguments=None):
    """Run the command with a list of arguments (None: the process's own) -> exit status."""
    def run():
        try:
            with warnings.catch_warnings():
                warnings.showwarning = show_warning
                draw(parse(arguments))
        except MemoryError:
            raise TinyldmError("not enough memory: take --low-memory, or a smaller --width and "
                               "--height") from None
    return status(run)


def status(run):
    """Run a command -> its exit status, whatever came of it; standard error says in a line what."""
    try:
        try:
            run()
        finally:
            sys.stdout.flush()                          # or it fails at the exit, past all hands
    except TinyldmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:                             # who read the output, such as head, left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141                                      # 128 + SIGPIPE, as shells have it
    return 0


def show_warning(message, *_):
    """A warning as one line, without the source line that gave it."""
    print(f"note: {message}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """argparse, but its errors are one line like all others."""

    def error(self, message):
        raise TinyldmError(f"{message} (--help lists what there is)")


def parse(arguments):
    parser = Parser("python -m tinyldm", description="Draw a picture of a prompt.")
    parser.add_argument("prompt", help="what to draw, at any length: (word) and (word:1.3) count "
                        "more, [word] less, BREAK starts a new piece of 75 tokens, and a bracket "
                        r"itself is \( \) \[ or \]")
    parser.add_argument("--weights", help="a folder in the diffusers layout, a single file in "
                        "the original one, or a name on the Hugging Face hub: owner/name, or "
                        "owner/name/file of a single file there (the bundled model)")
    parser.add_argument("--lora", type=lora, action="append", default=[], metavar="FILE[:WEIGHT]",
                        help="a LoRA to add to the weights, that many times (1); may be given "
                        "several times")
    parser.add_argument("--embedding", action="append", default=[], metavar="FILE",
                        help="a textual inversion, whose word the prompt may then use: the one in "
                        "the file, else the file's name; may be given several times")
    parser.add_argument("--output", type=Path, default=Path("out.png"),
                        help="the file, in any format Pillow writes (out.png)")
    parser.add_argument("--steps", type=int, help="1 to 1000; more is slower and finer "
                        "(what the weights recommend)")
    parser.add_argument("--guidance", type=float, default=7.5, help="how strongly to follow the "
                        "prompt; up to 1 the negative one plays no part (7.5)")
    parser.add_argument("--guidance-rescale", type=float, default=0.0, metavar="R",
                        help="0 to 1: how much of the contrast that guidance adds to take away "
                        "again (0)")
    parser.add_argument("--seed", type=int, default=0, help="where the noise comes from (0)")
    parser.add_argument("--negative", default="", metavar="TEXT", help="what not to draw")
    parser.add_argument("--width", type=int, help="in pixels (the weights' own)")
    parser.add_argument("--height", type=int, help="in pixels (the weights' own)")
    parser.add_argument("--count", type=int, default=1, help="how many pictures, of the seeds "
                        "K, K + 1, ...: out-0.png, out-1.png, ... (1)")
    parser.add_argument("--sampler", metavar="NAME", help="ddpm, ddim, pndm, euler, "
                        "euler_ancestral, heun, lms, dpmpp_2m, dpmpp_2m_karras, dpmpp_2m_sde, "
                        "dpmpp_2m_sde_karras, unipc or lcm (the weights' own)")
    parser.add_argument("--noise", metavar="NAME", default="torch-cpu", help="whose normal numbers "
                        "the seed stands for: torch-cpu, torch-cuda or numpy (torch-cpu)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--dtype", help="float16, float32 or float64: of the weights and of what "
                        "is made of them (float32, but for large weights in float16 files; "
                        "on cuda float16)")
    parser.add_argument("--low-memory", action="store_true", help="less memory for more time; "
                        "decodes what is larger than the weights' own pictures in tiles, a little "
                        "differently")
    parser.add_argument("--preview", type=int, metavar="N", help="every N steps write the picture "
                        "as it is predicted so far: out-step5.png, out-step10.png, ...")
    parser.add_argument("--animate", type=Path, metavar="FILE", help="write the drawing as an "
                        "animation, a frame a step: a .gif or .webp file")
    parser.add_argument("--show", action="store_true", help="draw the picture in the terminal too, "
                        "which must know 24-bit colours")
    parser.add_argument("--profile", action="store_true", help="tell at the end where time and "
                        "memory went: by stage, by block and by op")
    return parser.parse_args(arguments)


def lora(text):
    """FILE or FILE:WEIGHT -> (file, weight): what follows the last colon, if it is a number."""
    file, colon, weight = text.rpartition(":")
    try:
        return (file, float(weight)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def draw(args):
    """Draw, save and print the path of every picture asked for; then the profile, if asked for."""
    paths = output_paths(args.output, args.count)
    check_output(paths[0])
    if args.preview is not None and args.preview < 1:
        raise TinyldmError(f"--preview must be at least 1 step, not {args.preview}")
    if args.animate:
        if args.animate.suffix.lower() not in ANIMATED:
            raise TinyldmError(f"--animate must name a {' or '.join(ANIMATED)} file, "
                               f"not {args.animate}")
        check_output(output_paths(args.animate, args.count)[0])
    if not args.profile:
        return draw_pictures(args, paths)
    from .profiling import Profiler
    with Profiler() as profile:
        draw_pictures(args, paths, profile)
    print(profile, file=sys.stderr)


def draw_pictures(args, paths, profile=None):
    part = profile.stage if profile else nullcontext
    with part("loading"), stage("loading"):
        from .images import to_pil
        from .pipeline import load
        from .watch import Preview, animation, half_blocks
        pipe = load(args.weights, args.device, args.dtype, args.low_memory)
        for file, weight in args.lora:
            pipe.load_lora(file, weight)
        for file in args.embedding:
            pipe.load_textual_inversion(file)
    if profile:
        profile.watch(pipe)
    preview = Preview(pipe)
    for i, path in enumerate(paths):
        seed, frames = args.seed + i, []
        with part("reading the prompt"), stage("reading the prompt"):
            width, height = pipe.size(args.width, args.height)
            sampler = pipe.sampler(args.sampler)
            steps = pipe.num_inference_steps if args.steps is None else args.steps
            states = pipe.stream(args.prompt, args.negative, steps, args.guidance, seed, width,
                                 height, sampler=sampler, noise=args.noise,
                                 guidance_rescale=args.guidance_rescale)
            text = parameters(args, steps, sampler, seed, (width, height))
        with part("drawing"):
            for state in with_progress(states, steps, sampler):
                step = state.step + 1
                wanted = args.preview and step % args.preview == 0
                early = preview(state.pred_x0) if args.animate or wanted else None
                if args.animate:
                    frames.append(early)
                if wanted:
                    save(early, path.with_name(f"{path.stem}-step{step}{path.suffix}"), text)
        with stage("decoding"):
            with part("decoding"):
                image, = to_pil(pipe.decode(state.latents))
            with part("saving"):
                save(image, path, text)
                if args.animate:
                    first, options = animation([*frames[:-1], image])
                    save(first, output_paths(args.animate, args.count)[i], text, **options)
        if args.show:
            print(half_blocks(image, *shutil.get_terminal_size()), file=sys.stderr)
        print(path)


def with_progress(states, steps, sampler):
    """Pass on a stream's states, with a progress bar."""
    # PNDM makes its first step twice, Heun all but its last; diffusers counts them once as well.
    again = {"pndm": range(steps > 1), "heun": range(1, 2 * steps, 2)}.get(sampler, ())
    with progress("drawing", BAR, steps) as bar:
        for state in states:
            yield state
            bar.update(state.step not in again)


def progress(name, bar_format, total):
    from tqdm import tqdm  # after the arguments are read: a wrong one is answered at once
    return tqdm(desc=name, total=total, unit="step", bar_format=bar_format, file=sys.stderr)


@contextmanager
def stage(name):
    """Say what is being done, and afterwards how long it took."""
    with progress(name, CLOCK, 1) as bar:
        yield
        bar.update()


def parameters(args, steps, sampler, seed, size):
    """How a picture was made, as the text that web interfaces store in PNG files and read back."""
    negative = f"\nNegative prompt: {args.negative}" if args.negative else ""
    model = Path(args.weights).resolve().name if args.weights else BUNDLED
    noise = "" if args.noise == "torch-cpu" else f", Noise: {args.noise}"
    loras = ", ".join(f"{Path(file).stem}:{weight:g}" for file, weight in args.lora)
    loras = f", Lora: {json.dumps(loras, ensure_ascii=False)}" if loras else ""
    rescaled = f", CFG rescale: {args.guidance_rescale:g}" if args.guidance_rescale else ""
    return (f"{args.prompt}{negative}\nSteps: {steps}, Sampler: {sampler}, "
            f"CFG scale: {args.guidance:g}{rescaled}, Seed: {seed}, Size: {size[0]}x{size[1]}, "
            f"Model: {model}{noise}{loras}")


# ---- files ----------------------------------------------------------------------------------

def output_paths(output, count):
    """One path a picture: out.png, or for several out-0.png, out-1.png, ..."""
    if count < 1:
        raise TinyldmError(f"--count must be at least 1, not {count}")
    if os.path.isdir(output):
        raise TinyldmError(f"cannot write {output}: it is a folder; name a file in it")
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(count)]


def check_output(path):
    """Find out before the long drawing whether a picture can be saved there: write a small one.

    Raises TinyldmError.
    """
    from PIL import Image

    if not os.path.isdir(path.parent):
        raise TinyldmError(f"cannot write {path}: there is no folder {path.parent}")
    with temporary_beside(path) as temporary:
        write(Image.new("RGB", (16, 16)), path, temporary, "")


def save(image, path, text, **options):
    """Write under a temporary name, then move into place: the file is whole or not there."""
    with replacing(path) as temporary:
        write(image, path, temporary, text, **options)


def write(image, path, temporary, text, **options):
    """Save as `temporary` in the format of path's suffix; PNG carries the text as `parameters`."""
    from PIL import Image, PngImagePlugin

    suffix = path.suffix.lower()
    Image.preinit()                                     # the usual formats; all take 0.2 s more
    image_format = Image.EXTENSION.get(suffix) or Image.registered_extensions().get(suffix)
    if image_format not in Image.SAVE:
        known = sorted(end for end, name in Image.EXTENSION.items() if name in Image.SAVE)
        raise TinyldmError(f"{path} must end as a picture format does that Pillow writes: "
                           f"{' '.join(known)}")
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", text)
    options |= {"PNG": {"pnginfo": chunks}, "JPEG": {"quality": 95}}.get(image_format, {})
    try:
        image.save(temporary, image_format, **options)
    except (KeyError, ValueError) as error:             # what plugins say of a mode or a size
        raise TinyldmError(f"cannot write {path}: {image_format} does not take this picture "
                           f"({error}): choose another format") from None


if __name__ == "__main__":
    sys.exit(main())
