"""What a person waits for before the first picture, each in a process of its own.

    python -m tests.benchmarks.startup [--rounds 5] [--json PATH]

`import tinyldm` and the whole command with the bundled model, against `import diffusers` alone.
"""
import tempfile
from pathlib import Path

from . import timing

BUNDLED = Path(__file__).parents[2] / "weights" / "shapes" / "model_index.json"
PROMPT = "a big red circle above a small blue star on a yellow background"


def main():
    args = timing.arguments("Start-up times", rounds=5).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "import numpy": ["-c", "import numpy"],
            "import tinyldm": ["-c", "import tinyldm"],
            "first picture": ["-m", "tinyldm", PROMPT, "--output", f"{folder}/out.png"],
            "import diffusers": ["-c", "from diffusers import StableDiffusionPipeline"],
        }
        if not BUNDLED.is_file():
            print(f"no bundled model at {BUNDLED.parent}: its first picture is left out")
            del commands["first picture"]
        tables = timing.processes(commands, args.rounds)
    timing.report("Start-up", tables, "import diffusers", args.json)


if __name__ == "__main__":
    main()
