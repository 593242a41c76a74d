"""Reads one call, {"name": "f", "arguments": {...}}, that comes in parts.

The members may come in any order; others ("id", "type") are passed over. A call counts from the
moment on where its name is known to be a tool's and its arguments have begun: before that it may
turn out to be no call, and afterwards its arguments go out as they come.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Collection

from services.worker.parsing.json_scanner import ValueScanner

HEADER_CHARACTERS_MAX = 4096
_SPACE = frozenset(" \t\r\n")
_NAME = "name"
_ARGUMENTS = frozenset({"arguments", "parameters"})


class ScanState(enum.Enum):
    """What is expected next."""

    OPEN = enum.auto()
    KEY = enum.auto()
    IN_KEY = enum.auto()
    COLON = enum.auto()
    VALUE = enum.auto()
    IN_NAME = enum.auto()
    IN_ARGUMENTS = enum.auto()
    IN_OTHER = enum.auto()
    COMMA = enum.auto()
    DONE = enum.auto()
    BAD = enum.auto()


class CallScanner:
    """Reads one call.

    Attributes:
        state: what is expected next; DONE behind the closing brace, BAD where it is no call or
            breaks off. Neither goes on.
        is_call: the name is known and the arguments have begun.
        name: of the tool, once that is known; else empty.
        raw: what was consumed and is in no arguments that went out: everything, before it is a
            call; what follows its arguments, afterwards. At most 4096 characters.
    """

    __slots__ = (
        "_arguments",
        "_has_arguments",
        "_key",
        "_scanner",
        "_token",
        "_tool_names",
        "is_call",
        "name",
        "raw",
        "state",
    )

    def __init__(self, tool_names: Collection[str]) -> None:
        self._tool_names = tool_names
        self._scanner = ValueScanner('"')
        # The string, key or value, that is being read.
        self._token = ""
        self._key = ""
        # Arguments that have not been taken.
        self._arguments = ""
        self._has_arguments = False
        self.state = ScanState.OPEN
        self.is_call = False
        self.name = ""
        self.raw = ""

    def take_arguments(self) -> str:
        """Returns the arguments that came since the last time."""
        arguments, self._arguments = self._arguments, ""
        return arguments

    def feed(self, text: str, position: int) -> int:
        """Consumes characters of `text` from a position on and returns where it stopped.

        Before the end of `text` it stops only where it is DONE or BAD.
        """
        end = len(text)
        while position < end and self.state not in (ScanState.DONE, ScanState.BAD):
            if self.state is ScanState.IN_ARGUMENTS and self.is_call:
                position = self._stream_arguments(text, position)
                continue
            room = HEADER_CHARACTERS_MAX - len(self.raw)
            if room <= 0:
                self.state = ScanState.BAD
                break
            if self.state in _IN_VALUE:
                position = self._pass_value(text, position, min(end, position + room))
            else:
                position = self._pass_character(text, position)
        return position

    def _stream_arguments(self, text: str, position: int) -> int:
        stopped = self._scanner.advance(text, position, len(text))
        self._arguments += text[position:stopped]
        if self._scanner.is_broken:
            self.state = ScanState.BAD
        elif self._scanner.is_done:
            self.state = ScanState.COMMA
        return stopped

    def _pass_value(self, text: str, position: int, end: int) -> int:
        stopped = self._scanner.advance(text, position, end)
        consumed = text[position:stopped]
        self.raw += consumed
        self._token += consumed
        if self._scanner.is_broken:
            self.state = ScanState.BAD
        elif self._scanner.is_done:
            self._end_value()
        return stopped

    def _end_value(self) -> None:
        token, state = self._token, self.state
        self._token = ""
        if state is ScanState.IN_KEY:
            self._key = _text_of(token)
            self.state = ScanState.COLON
            return
        self.state = ScanState.COMMA
        if state is ScanState.IN_ARGUMENTS:
            self._arguments = token
        elif state is ScanState.IN_NAME:
            self._end_name(_text_of(token))

    def _end_name(self, name: str) -> None:
        if name not in self._tool_names:
            self.state = ScanState.BAD
            return
        self.name = name
        if self._has_arguments:
            self._begin_call()

    def _begin_call(self) -> None:
        self.is_call = True
        self.raw = ""

    def _pass_character(self, text: str, position: int) -> int:
        character = text[position]
        if character not in _SPACE and not self._accept(character):
            self.state = ScanState.BAD
            return position
        # Where this character began the arguments of a call it is one of them.
        if not (self.state is ScanState.IN_ARGUMENTS and self.is_call):
            self.raw += character
        return position + 1

    def _accept(self, character: str) -> bool:
        match self.state:
            case ScanState.OPEN:
                return self._expect(character, "{", ScanState.KEY)
            case ScanState.KEY:
                return self._begin(character, '"', ScanState.IN_KEY)
            case ScanState.COLON:
                return self._expect(character, ":", ScanState.VALUE)
            case ScanState.VALUE:
                return self._accept_value(character)
            case ScanState.COMMA if character == "}" and self.is_call:
                self.state = ScanState.DONE
                return True
            case _:
                return self._expect(character, ",", ScanState.KEY)

    def _accept_value(self, character: str) -> bool:
        if self._key == _NAME:
            return not self.name and self._begin(character, '"', ScanState.IN_NAME)
        if self._key not in _ARGUMENTS:
            return self._begin(character, character, ScanState.IN_OTHER)
        if self._has_arguments or not self._begin(character, "{", ScanState.IN_ARGUMENTS):
            return False
        self._has_arguments = True
        if self.name:
            self._begin_call()
            self._arguments, self._token = character, ""
        return True

    def _expect(self, character: str, expected: str, state: ScanState) -> bool:
        self.state = state
        return character == expected

    def _begin(self, character: str, expected: str, state: ScanState) -> bool:
        self.state = state
        self._scanner = ValueScanner(character)
        self._token = character
        return character == expected and not self._scanner.is_broken


_IN_VALUE = frozenset(
    {ScanState.IN_KEY, ScanState.IN_NAME, ScanState.IN_ARGUMENTS, ScanState.IN_OTHER}
)


def _text_of(token: str) -> str:
    """Returns what a JSON string says; empty when it is none."""
    try:
        value: object = json.loads(token)
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""
