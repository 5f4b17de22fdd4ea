"""The package's source files."""
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "tinyldm"

SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
