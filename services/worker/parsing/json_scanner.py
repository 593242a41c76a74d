"""Finds the end of a JSON value that comes in parts. Linear; keeps three small numbers.

It looks at brackets, quotes and the characters that JSON knows outside of strings. What it finds is
not checked any further: a value goes on to the client as the model wrote it.
"""

from __future__ import annotations

import re

_STRING_RUN = re.compile(r'[^"\\]*')
_SCALAR_RUN = re.compile(r"[0-9+\-.eEtrufalsn]*")
_STRUCTURE_RUN = re.compile(r"[ \t\r\n,:0-9+\-.eEtrufalsn]*")
_SCALAR_START = frozenset("-0123456789tfn")


class ValueScanner:
    """Scans one value behind its first character.

    Attributes:
        is_done: the value is complete.
        is_broken: what came next is no JSON; it was not consumed.
    """

    __slots__ = ("_depth", "_is_escaped", "_is_scalar", "_is_string", "is_broken", "is_done")

    def __init__(self, first: str) -> None:
        self._is_string = first == '"'
        self._depth = int(first in "{[")
        self._is_scalar = first in _SCALAR_START
        self._is_escaped = False
        self.is_done = False
        self.is_broken = not (self._is_string or self._depth or self._is_scalar)

    def advance(self, text: str, position: int, end: int) -> int:
        """Consumes characters of `text` from a position on and returns where it stopped.

        Before `end` it stops only where the value is done or broken.
        """
        while position < end and not (self.is_done or self.is_broken):
            if self._is_string:
                position = self._pass_string(text, position, end)
            elif self._is_scalar:
                position = _run_end(_SCALAR_RUN, text, position, end)
                self.is_done = position < end
            else:
                position = self._pass_structure(text, position, end)
        return position

    def _pass_string(self, text: str, position: int, end: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            return position + 1
        position = _run_end(_STRING_RUN, text, position, end)
        if position == end:
            return end
        if text[position] == "\\":
            self._is_escaped = True
        else:
            self._is_string = False
            self.is_done = self._depth == 0
        return position + 1

    def _pass_structure(self, text: str, position: int, end: int) -> int:
        position = _run_end(_STRUCTURE_RUN, text, position, end)
        if position == end:
            return end
        character = text[position]
        if character == '"':
            self._is_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.is_done = self._depth == 0
        else:
            self.is_broken = True
            return position
        return position + 1


def _run_end(run: re.Pattern[str], text: str, position: int, end: int) -> int:
    found = run.match(text, position, end)
    assert found is not None  # It matches nothing, too.
    return found.end()
