"""python -m tinyldm "a prompt": see cli/draw.py."""
import sys

from .cli.draw import main

if __name__ == "__main__":
    sys.exit(main())
