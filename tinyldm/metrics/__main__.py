"""python -m tinyldm.metrics fid REAL DRAWN: see command.py."""
import sys

from ..cli.console import status


def main(arguments=None):
    """Run the command with a list of arguments (None: the process's own) -> exit status."""
    def run():
        from .command import run  # here, so that Ctrl-C may come now
        run(arguments)
    return status(run)


if __name__ == "__main__":
    sys.exit(main())
