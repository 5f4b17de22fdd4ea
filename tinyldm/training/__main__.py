"""python -m tinyldm.training NAME: see options.py."""
import sys

from .. import ranks
from ..cli.console import start


def main(arguments=None):
    """Run the command with a list of arguments (None: the process's own) -> exit status."""
    return start("tinyldm.training.options", arguments,
                 interrupted="stopped; the same command with --resume goes on")


if __name__ == "__main__":
    sys.exit(ranks.program(main))
