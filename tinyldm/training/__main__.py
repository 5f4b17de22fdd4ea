"""python -m tinyldm.training STAGE: the recipe of the bundled model, one command a stage."""
import argparse
import json
import sys
from pathlib import Path

from ..errors import TinyldmError


def parse_arguments():
    parser = argparse.ArgumentParser(prog="python -m tinyldm.training", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    vae = stages.add_parser("vae", help="1. train the autoencoder")
    vae.add_argument("--steps", type=int, default=2000)
    unet = stages.add_parser("unet", help="2. train the UNet and the text transformer")
    unet.add_argument("--steps", type=int, default=20000)
    unet.add_argument("--batch", type=int, default=64, help="latents a step")
    decoder = stages.add_parser("decoder", help="3. train the autoencoder's second half on")
    decoder.add_argument("--steps", type=int, default=2000)
    export = stages.add_parser("export", help="4. write the weights in the public layout")
    export.add_argument("--output", type=Path, default=Path("weights/shapes"))
    restore = stages.add_parser("restore", help="weights back into a training that can go on")
    restore.add_argument("--weights", type=Path, default=Path("weights/shapes"))
    for stage in (vae, unet, decoder, export, restore):
        stage.add_argument("--run", type=Path, default=Path("runs/shapes"),
                           help="folder of the training's state, from which it resumes")
    evaluate = stages.add_parser("evaluate", help="5. measure how well held-out prompts are drawn")
    evaluate.add_argument("--weights", help="folder of weights (default: the bundled model)")
    evaluate.add_argument("--prompts", type=int, default=200)
    evaluate.add_argument("--round-trip", action="store_true",
                          help="true drawings, only sent through the VAE and back")
    evaluate.add_argument("--output", type=Path, help="folder for accuracy.json and samples.png")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    if arguments.stage == "vae":
        from .vae import train_vae
        train_vae(arguments.run, arguments.steps)
    elif arguments.stage == "unet":
        from .unet import train_unet
        train_unet(arguments.run, arguments.steps, arguments.batch)
    elif arguments.stage == "decoder":
        from .vae import train_decoder
        train_decoder(arguments.run, arguments.steps)
    elif arguments.stage == "export":
        from .export import export
        export(arguments.run, arguments.output)
    elif arguments.stage == "restore":
        from .export import restore
        restore(arguments.weights, arguments.run)
    else:
        measure(arguments)


def measure(arguments):
    import numpy as np

    from ..checkpoints import load_model, resolve
    from ..metrics.evaluate import evaluate, grid, round_trip
    from ..pipeline import load
    from .data import draw, held_out_scenes

    scenes = held_out_scenes(arguments.prompts, seed=0)
    prompts = list(scenes)
    if arguments.round_trip:
        drawings = np.stack([draw(scene) for scene in scenes.values()])
        vae = load_model(resolve(arguments.weights) / "vae")
        accuracies, pictures = round_trip(vae, drawings, prompts)
    else:
        accuracies, pictures = evaluate(load(arguments.weights), prompts)
    report = {"prompts": len(prompts), **{name: round(a, 4) for name, a in accuracies.items()}}
    print(json.dumps(report, indent=2))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n")
        grid(pictures[:48], columns=12).save(arguments.output / "samples.png")
        (arguments.output / "samples.txt").write_text("\n".join(prompts[:48]) + "\n")


if __name__ == "__main__":
    try:
        main()
    except TinyldmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes", file=sys.stderr)
        sys.exit(130)
