"""python -m tinyldm.xray "PROMPT": see command.py."""
import sys

from ..cli.console import start


def main(arguments=None):
    """Run the command with a list of arguments (None: the process's own) -> exit status."""
    return start("tinyldm.xray.command", arguments)


if __name__ == "__main__":
    sys.exit(main())
