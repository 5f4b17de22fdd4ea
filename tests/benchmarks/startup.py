"""What a person waits for before the first picture, each in a process of its own.

    python -m tests.benchmarks.startup [--rounds 5] [--json PATH]

`import tinyldm`, and the whole command that draws a picture with the bundled model, against `import
diffusers` alone, which loads no model yet.
"""
import tempfile

from tests.benchmarks import timing

PROMPT = "a big red circle above a small blue star on a yellow background"


def main():
    args = timing.arguments("Start-up times", rounds=5).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "import": ["-c", "import tinyldm"],
            "picture": ["-m", "tinyldm", PROMPT, "--output", f"{folder}/out.png"],
            "import diffusers": ["-c", "import diffusers"],
        }
        seconds, gigabytes = timing.processes(commands, args.rounds)
    rows = [("import tinyldm", "s", against(seconds, "import")),
            ("the first bundled picture", "s", against(seconds, "picture")),
            ("the first bundled picture, peak memory", "GB", against(gigabytes, "picture"))]
    timing.report("Start-up", rows, "import diffusers", args.json)


def against(samples, ours):
    return {"tinyldm": samples[ours], "import diffusers": samples["import diffusers"]}


if __name__ == "__main__":
    main()
