"""python -m tinyldm.xray "PROMPT": draw one picture, and write all that was computed as a page.

The path of the page goes to standard output, and progress to standard error. Anything wrong ends in
one line, `error: ...`, and exit status 2. The file is whole or not there.
__main__.py -> command.py -> record.py, page.py
"""
from pathlib import Path

from ..cli.console import notes, say
from ..cli.draw import stage
from ..cli.options import Formatter, Parser, output_path
from ..errors import TinyldmError
from ..files import replacing

DESCRIPTION = """See inside a drawing: one picture from noise to the end, as a page for a browser.

The page is one file that needs no network: the latents of every step, where each word is read, what
it does, every block of the U-Net, guidance by hand, a gradient checked. With the bundled model it
takes less than a minute.

example:
  python -m tinyldm.xray "a big red star left of a small blue circle on a yellow background"
"""


def run(arguments=None):
    """Write the page. Raises TinyldmError for whatever is wrong."""
    args = parse(arguments)
    try:
        with notes():
            write(args)
    except MemoryError:
        raise TinyldmError("not enough memory: use a smaller --width and --height, fewer --steps, "
                           "or --no-gradients") from None


def parse(arguments):
    parser = Parser("python -m tinyldm.xray", usage="python -m tinyldm.xray \"PROMPT\" [options]",
                    description=DESCRIPTION, formatter_class=Formatter)
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help="what to draw; a model of classes takes a label's number")
    add("--seed", type=int, default=0, metavar="K", help="of the noise (0)")
    add("--steps", type=int, default=25, metavar="N", help="1 to 1000; the page keeps up to 25 of "
        "them (25)")
    add("--guidance", type=float, metavar="S", help="how strongly to follow the prompt (what the "
        "weights recommend)")
    add("--negative", default="", metavar="TEXT", help="what the picture should not be (nothing)")
    add("--sampler", default="ddim", metavar="NAME", help="as python -m tinyldm knows them (ddim)")
    add("--width", type=int, metavar="W", help="of the picture (the weights' own)")
    add("--height", type=int, metavar="H", help="of the picture (the weights' own)")
    add("--no-gradients", action="store_true", help="leave out all that needs a backward pass: "
        "faster, and for large models less memory")
    add("--weights", metavar="W", help="as python -m tinyldm takes them: a folder, a file, or a "
        "name on the Hugging Face hub (the bundled model)")
    add("--device", default="cpu", metavar="NAME", help="cpu or cuda (cpu)")
    add("--dtype", metavar="NAME", help="float16, float32 or float64 (float32; on cuda float16)")
    add("--output", type=output_path, default=Path("xray.html"), metavar="FILE", help="the page "
        "(xray.html)")
    args = parser.parse_args(arguments)
    if args.output.suffix.lower() not in (".html", ".htm"):
        raise TinyldmError(f"--output must name an .html file, not {args.output}")
    return args


def write(args):
    """Draw, record and write the page; print its path."""
    with replacing(args.output) as temporary:           # a place that takes no file is named first
        with stage("loading"):
            from ..pipelines.loading import load
            from .page import page
            from .record import xray

            pipe = load(args.weights, args.device, args.dtype)
        sizes = {name: value for name in ("width", "height")
                 if (value := getattr(args, name)) is not None}
        record = xray(pipe, prompt_of(args.prompt, pipe), seed=args.seed,
                      num_inference_steps=args.steps, guidance_scale=args.guidance,
                      sampler=args.sampler, negative_prompt=args.negative,
                      gradients=not args.no_gradients, **sizes)
        with stage("writing"):
            temporary.write_text(page(record), encoding="utf-8")
    say(args.output, exact=True)


def prompt_of(text, pipe):
    """A text, or the number of a class where the model takes such."""
    takes_text = "prompt" in pipe.Options.__dataclass_fields__
    return text if takes_text or not text.isdecimal() else int(text)
