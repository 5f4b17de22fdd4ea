"""python -m tinyldm.inspect FILE: see describe.py."""
import sys

from ..cli.console import start


def main(arguments=None):
    """Run the command with a list of arguments (None: the process's own) -> exit status."""
    return start("tinyldm.inspect.describe", arguments)


if __name__ == "__main__":
    sys.exit(main())
