"""A small terminal: what text with escape codes leaves on the screen, as colours of half blocks."""
import re

import numpy as np

CODES = re.compile(r"\x1b\[([\d;]*)([A-Za-z])|(.)", re.DOTALL)


class Screen:
    """rows x columns cells. Each holds a character and the colours of its upper and lower half."""

    def __init__(self, columns, rows):
        self.columns, self.rows = columns, rows
        self.lines = [self._line()]                     # from the top, with what scrolled away
        self.x, self.y, self.colours = 0, 0, (None, None)

    def _line(self):
        return [(" ", None, None)] * self.columns

    def feed(self, text):
        for numbers, code, char in CODES.findall(text):
            if char == "\r":
                self.x = 0
            elif char == "\n":
                self.x = 0
                self._down(1)
            elif char:
                if self.x == self.columns:              # a full line wraps with the next character
                    self.x = 0
                    self._down(1)
                self.lines[self.y][self.x] = (char, *self.colours)
                self.x += 1
            elif code == "m":
                self._colour([int(number or 0) for number in numbers.split(";")])
            elif code == "A":                           # not above the visible screen
                self.y = max(self.y - int(numbers or 1), len(self.lines) - self.rows, 0)
            elif code == "B":
                self.y = min(self.y + int(numbers or 1), len(self.lines) - 1)
            else:
                raise AssertionError(f"an escape code that this terminal lacks: {code!r}")
        return self

    def _down(self, count):
        self.y += count
        while self.y >= len(self.lines):
            self.lines.append(self._line())

    def _colour(self, numbers):
        if numbers == [0]:
            self.colours = None, None
        else:
            assert numbers[:2] == [38, 2] and numbers[5:7] == [48, 2], numbers
            self.colours = tuple(numbers[2:5]), tuple(numbers[7:])

    def text(self):
        """The lines of plain characters, without spaces at their ends."""
        return ["".join(char for char, *_ in line).rstrip() for line in self.lines]

    def pictures(self):
        """Blocks of lines with half blocks in them -> arrays (2*lines, columns, 3), top first."""
        found, rows = [], []
        for line in [*self.lines, self._line()]:
            cells = [cell[1:] for cell in line if cell[0] == "\u2580"]
            if cells:
                rows += [[upper for upper, _ in cells], [lower for _, lower in cells]]
            elif rows:
                found.append(np.array(rows))
                rows = []
        return found
