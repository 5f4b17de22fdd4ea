"""python -m tinyldm "a prompt": see cli/draw.py."""
import sys

from . import ranks
from .cli.console import start


def main(arguments=None):
    """Run the command with a list of arguments (None: the process's own) -> exit status."""
    return start("tinyldm.cli.draw", arguments)


if __name__ == "__main__":
    sys.exit(ranks.program(main))
