"""python -m tinyldm.shapes STAGE: the stages of the bundled model's recipe."""
import sys

from .. import ranks
from ..cli.console import start


def main(arguments=None):
    """Run the command with a list of arguments (None: the process's own) -> exit status."""
    return start("tinyldm.shapes.recipe", arguments,
                 interrupted="stopped; the same command resumes")


if __name__ == "__main__":
    sys.exit(ranks.program(main))
