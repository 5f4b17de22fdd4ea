"""python -m tinyldm.shapes STAGE: the recipe of the bundled model, one command per stage."""
from pathlib import Path

from ..cli.options import Parser
from ..training.options import add_looks, whole
from .autoencoder import train_decoder, train_vae
from .comparison.command import SYSTEMS, compare
from .denoiser import BATCH, POOL, train_unet
from .evaluation import evaluate
from .export import export, restore
from .pictures import write_pictures

MOST_STEPS = 10 ** 9
MOST_AT_ONCE = 10_000       # latents per batch, prompts to draw


def parse(arguments):
    parser = Parser(prog="python -m tinyldm.shapes", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    vae = stages.add_parser("vae", help="1. train the autoencoder")
    vae.add_argument("--steps", type=whole(1, MOST_STEPS), default=2000)
    unet = stages.add_parser("unet", help="2. train the UNet and the text transformer")
    unet.add_argument("--steps", type=whole(1, MOST_STEPS), default=20000)
    unet.add_argument("--batch", type=whole(1, MOST_AT_ONCE), default=64, help="latents per step")
    unet.add_argument("--pool", type=whole(BATCH, 10 ** 6), help="pictures that are "
                      f"drawn and encoded before the first step ({POOL})")
    decoder = stages.add_parser("decoder", help="3. train the autoencoder's decoder further")
    decoder.add_argument("--steps", type=whole(1, MOST_STEPS), default=2000)
    export = stages.add_parser("export", help="4. write the weights in the public layout")
    export.add_argument("--output", type=Path, default=Path("weights/shapes"))
    restore = stages.add_parser("restore", help="turn weights back into a training")
    restore.add_argument("--weights", type=Path, default=Path("weights/shapes"))
    for stage in (vae, unet, decoder, export, restore):
        stage.add_argument("--run", type=Path, default=Path("runs/shapes"),
                           help="folder of the training's state, from which it resumes")
    for stage in (vae, unet, decoder):
        add_looks(stage.add_argument)
        stage.add_argument("--device", choices=("cpu", "cuda"), default="cpu",
                           help="where to compute (cpu)")
    pictures = stages.add_parser("pictures", help="write pictures and captions of the toy world "
                                 "as a folder, for python -m tinyldm.training")
    pictures.add_argument("--output", type=Path, required=True, help="a new folder")
    pictures.add_argument("--count", type=whole(1, 100_000), default=2000, help="(2000)")
    pictures.add_argument("--seed", type=whole(0), default=0, help="of the drawings (0)")
    kind = pictures.add_mutually_exclusive_group()
    kind.add_argument("--crowds", action="store_true", help="every second picture shows a "
                          "crowd of things, without a caption, for an autoencoder")
    kind.add_argument("--single", action="store_true", help="one thing per picture; its shape "
                          "begins the file's name, circle_00000.png, for --classes names")
    evaluate = stages.add_parser("evaluate", help="5. measure how well held-out prompts are drawn")
    evaluate.add_argument("--weights", help="folder of weights (default: the bundled model)")
    evaluate.add_argument("--prompts", type=whole(1, MOST_AT_ONCE), default=200)
    evaluate.add_argument("--round-trip", action="store_true",
                          help="judge true drawings, encoded and decoded by the VAE, instead")
    evaluate.add_argument("--output", type=Path, help="folder for accuracy.json and samples.png")
    compare = stages.add_parser("compare", help="train and measure other systems on the same "
                                "pictures, with one budget: docs/comparison.md")
    compare.add_argument("name", choices=[*SYSTEMS, "sizes", "table"],
                         help="one of the systems; latent models of several sizes; or the page's "
                         "tables and figures, from what was measured")
    compare.add_argument("--run", type=Path, default=Path("runs/comparison"),
                         help="folder of all states and results; the same command goes on")
    compare.add_argument("--docs", type=Path, default=Path("docs"),
                         help="where table writes")
    return parser.parse_args(arguments)


COMMANDS = {"vae": train_vae, "unet": train_unet, "decoder": train_decoder, "export": export,
            "restore": restore, "evaluate": evaluate, "pictures": write_pictures,
            "compare": compare}


def run(arguments=None):
    """Run one stage. Raises TinyldmError for a bad input."""
    options = vars(parse(arguments))
    COMMANDS[options.pop("stage")](**options)
