"""python -m tinyldm "a prompt": see cli/draw.py."""
import sys

from . import ranks
from .cli.console import status


def main(arguments=None):
    """Run the command with a list of arguments (None: the process's own) -> exit status."""
    def run():
        from .cli.draw import run  # here, so that Ctrl-C may come now
        run(arguments)
    return status(run)


if __name__ == "__main__":
    sys.exit(ranks.program(main))
