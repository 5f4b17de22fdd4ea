"""python -m tinyldm.training NAME: see options.py."""
import sys

from .. import ranks
from ..cli.console import status


def main(arguments=None):
    """Run the command with a list of arguments (None: the process's own) -> exit status."""
    def run():
        from .options import run  # here, so that Ctrl-C may come now
        run(arguments)
    return status(run, interrupted="stopped; the same command with --resume goes on")


if __name__ == "__main__":
    sys.exit(ranks.program(main))
