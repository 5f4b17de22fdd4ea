"""All benchmarks, one after another, each in a process of its own; then one table of them all.

    python -m tests.benchmarks [--only NAME ...] [--rounds N] [--output FOLDER]

Writes NAME.json into the folder. Where that is docs/measured, which it is unless told otherwise,
the figures that README.md and docs/ quote are brought up to date as well. --tables does only that.
"""
import argparse
import subprocess
import sys
from pathlib import Path

from tests.benchmarks import figures


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks",
                                     description="Time tinyldm beside the references")
    parser.add_argument("--only", nargs="+", choices=figures.AIMS, default=list(figures.AIMS),
                        metavar="NAME", help=f"which ones (all): {', '.join(figures.AIMS)}")
    parser.add_argument("--rounds", type=int, help="runs of each (every benchmark has its own)")
    parser.add_argument("--output", type=Path, default=figures.MEASURED, metavar="FOLDER",
                        help="where the numbers are written (docs/measured)")
    parser.add_argument("--tables", action="store_true", help="measure nothing, only show")
    args = parser.parse_args()
    if not args.tables:
        args.output.mkdir(parents=True, exist_ok=True)
        rounds = ["--rounds", str(args.rounds)] if args.rounds else []
        for name in args.only:
            command = [sys.executable, "-m", f"tests.benchmarks.{name}", *rounds]
            done = subprocess.run([*command, "--json", args.output / f"{name}.json"])
            if done.returncode:
                sys.exit(f"the benchmark {name} failed")
    measured = figures.read(args.output)
    print("\n" + figures.table([name for name in args.only if name != "where"], measured))
    if args.output.resolve() == figures.MEASURED:
        for page in figures.pages():
            text = page.read_text("utf-8")
            page.write_text(figures.fill(text, measured), "utf-8")


if __name__ == "__main__":
    main()
