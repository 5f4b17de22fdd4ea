"""The options of the command line, and the pictures that they ask for.

--help must be fast, so what takes long to import is imported inside functions.
"""
import argparse
import os
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import TinyldmError, note
from ..pipelines.interpolation import Between, ends

INTERPOLATED = 8            # pictures from one prompt, seed or image to another


class Parser(argparse.ArgumentParser):
    """argparse, with errors in one line like all others."""

    def error(self, message):
        raise TinyldmError(f"{message} (--help lists the options)")


def parse(arguments):
    parser = Parser("python -m tinyldm", description="Draw a picture of a prompt.")
    parser.add_argument("prompt", nargs="+", help="what to draw, at any length: (word) and "
                        "(word:1.3) count more, [word] less, BREAK starts a new chunk of 75 "
                        r"tokens, and a bracket itself is \( \) \[ or \]; several prompts give "
                        "several pictures")
    parser.add_argument("--weights", help="a folder in the diffusers layout, a single file in "
                        "the original one, or a name on the Hugging Face hub: owner/name, or "
                        "owner/name/file for a single file there (the bundled model)")
    parser.add_argument("--ema", action="store_true", help="if a single file has the UNet's "
                        "weights twice, use those averaged over the training")
    parser.add_argument("--lora", type=lora, action="append", default=[], metavar="FILE[:WEIGHT]",
                        help="a LoRA to add to the weights, times WEIGHT (1); may be given several "
                        "times")
    parser.add_argument("--embedding", action="append", default=[], metavar="FILE",
                        help="a textual inversion: a learned word to use in the prompt, the one "
                        "in the file, else the file's name; may be given several times")
    parser.add_argument("--output", type=path, default=Path("out.png"),
                        help="the file to write, in any format of Pillow's (out.png)")
    parser.add_argument("--steps", type=int, help="1 to 1000; more is slower and finer "
                        "(what the weights recommend)")
    parser.add_argument("--guidance", type=float, help="how strongly to follow the "
                        "prompt; up to 1 the negative prompt plays no part (7.5; Stable Diffusion "
                        "XL 5, Latent Consistency Models 8.5)")
    parser.add_argument("--guidance-rescale", type=float, default=0.0, metavar="R",
                        help="0 to 1: how much to undo of the over-saturation that guidance "
                        "causes (0)")
    parser.add_argument("--seed", type=int, default=0, help="where the noise comes from (0)")
    parser.add_argument("--negative", default="", metavar="TEXT", help="what not to draw")
    parser.add_argument("--width", type=int, help="in pixels (the weights' own)")
    parser.add_argument("--height", type=int, help="in pixels (the weights' own)")
    parser.add_argument("--count", type=int, help="how many pictures of each prompt, with the "
                        "seeds K, K + 1, ...: out-0.png, out-1.png, ... (1; with --to-... "
                        f"{INTERPOLATED})")
    parser.add_argument("--image", type=path, metavar="FILE", help="a picture to begin from; the "
                        "new one gets its size, unless --width and --height are given")
    parser.add_argument("--strength", type=float, metavar="S", help="0 to 1: how much of the image "
                        "to draw anew (0.8, with a mask 1; Stable Diffusion XL 0.3, with a "
                        "mask 0.9999)")
    parser.add_argument("--mask", type=path, metavar="FILE", help="a picture, white where to paint "
                        "and black where the image is to stay, as well as the VAE can render it")
    parser.add_argument("--variation", type=float, metavar="V", help="0 to 1: draw --count "
                        "variations of the seed's picture, with this share of other seeds' noise")
    parser.add_argument("--to-prompt", metavar="TEXT", help="draw --count pictures that lead from "
                        "the prompt to this one")
    parser.add_argument("--to-seed", type=int, metavar="K", help="the same from seed to seed")
    parser.add_argument("--to-image", type=path, metavar="FILE", help="the same from --image to "
                        "this picture, by interpolating their latents")
    parser.add_argument("--sampler", metavar="NAME", help="ddpm, ddim, pndm, euler, "
                        "euler_ancestral, heun, lms, dpmpp_2m, dpmpp_2m_karras, dpmpp_2m_sde, "
                        "dpmpp_2m_sde_karras, unipc or lcm (the weights' own)")
    parser.add_argument("--clip-skip", type=int, metavar="N", help="how many of the text encoder's "
                        "last layers to leave out, counted as in diffusers (0)")
    parser.add_argument("--timestep-spacing", metavar="NAME", help="how the steps are spread over "
                        "the training timesteps: leading, trailing or linspace (the weights' own; "
                        "for a single file in up to 8 steps without guidance, as Turbo models take "
                        "them, trailing)")
    parser.add_argument("--noise", metavar="NAME", default="torch-cpu", help="whose normal numbers "
                        "the seed stands for: torch-cpu, torch-cuda or numpy (torch-cpu)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--dtype", help="float16, float32 or float64, for weights and computation "
                        "(float32, where large weights of float16 files stay float16; on cuda "
                        "float16)")
    parser.add_argument("--low-memory", action="store_true", help="use less memory and more time; "
                        "decodes pictures larger than the weights' own in tiles, which changes "
                        "them a little")
    parser.add_argument("--preview", type=int, metavar="N", help="every N steps write the picture "
                        "as predicted so far: out-step5.png, out-step10.png, ...")
    parser.add_argument("--animate", type=path, metavar="FILE", help="write an animation, one "
                        "frame per step, or with --to-... one frame per picture: a .gif or .webp "
                        "file")
    parser.add_argument("--show", action="store_true", help="also draw the picture in the "
                        "terminal, which needs 24-bit colours")
    parser.add_argument("--profile", action="store_true", help="at the end print where time and "
                        "memory went: by stage, by block and by op")
    return parser.parse_args(arguments)


def path(text):
    return Path(text).expanduser()


def lora(text):
    """FILE or FILE:WEIGHT -> (file, weight): what follows the last colon, if it is a number.

    A file may itself be named so: it counts if it is there.
    """
    if os.path.isfile(text):
        return text, 1.0
    file, colon, weight = text.rpartition(":")
    try:
        return (file, float(weight)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


class Job(NamedTuple):
    """A picture to draw: these options of stream. All except the mask may be a Between."""

    prompt: Any
    seed: Any
    image: Any                                          # a PIL image, or None
    mask: Any                                           # the same

    @property
    def weight(self):
        """The weight of its Between; None without one."""
        return next((value.weight for value in self if isinstance(value, Between)), None)


def jobs(args):
    """The pictures that the arguments ask for -> [Job]. Raises TinyldmError for a wrong argument.
    """
    from ..images import open_image

    between_two = interpolates(args)
    if args.to_image and not args.image:
        raise TinyldmError("--to-image needs an --image to lead from: give both")
    if args.variation is not None and between_two:
        raise TinyldmError("--variation and --to-... exclude each other: leave one out")
    if args.variation is not None and not 0 <= args.variation <= 1:
        raise TinyldmError(f"--variation must be from 0 to 1, not {args.variation:g}")
    count = (INTERPOLATED if between_two else 1) if args.count is None else args.count
    if count < 1 + between_two:
        raise TinyldmError(f"--count must be at least {1 + between_two}, not {count}")
    if len(args.prompt) > 1 and not any(" " in prompt for prompt in args.prompt):
        note(f"{len(args.prompt)} prompts of one word each are drawn: put a prompt of several "
             "words in quotes")
    image, to_image = (file and open_image(file) for file in (args.image, args.to_image))
    mask = args.mask and open_image(args.mask, "L")

    def between(first, second, i):
        return first if second is None else Between(first, second, i / (count - 1))

    found = []
    for prompt in args.prompt:
        for i in range(count):
            if between_two:
                seed = between(args.seed, args.to_seed, i)
            elif args.variation is not None:
                seed = Between(args.seed, args.seed + 1 + i, args.variation)
            else:
                seed = args.seed + i
            found.append(Job(between(prompt, args.to_prompt, i), seed,
                             between(image, to_image, i), mask))
    check_prompts_and_seeds(found, args.noise)
    return found


def check_prompts_and_seeds(found, noise):
    """Raise TinyldmError for a wrong one in any job, before the first picture is drawn."""
    from ..noise import get_generator
    from ..text.prompt import parse as parse_prompt

    generator = get_generator(noise)
    for job in found:
        for text in ends(job.prompt):
            parse_prompt(text)
        for seed in ends(job.seed):
            generator(seed)


def interpolates(args):
    return any(end is not None for end in (args.to_prompt, args.to_seed, args.to_image))
