r"""Splits the text of one output into text, reasoning and calls of tools, as it comes. Pure.

The pieces of an output are the same however its text is cut: held back is exactly what may become
something else with the next characters. That is the beginning of a mark, the white space (at most
64 characters) that a mark would swallow, and a call before its name and its arguments are known.

    characters | Let me look.\n | <tool_call>\n{"name":"f","arguments": | {"a":1} | }\n</tool_call>
    pieces     | text     held | held                                 | call 0  | nothing

What holds:
    order      pieces come in the order of the text
    marks      a mark and the white space around it are shown nowhere
    reasoning  begins the output or does not come: behind an answer its marks are text. Calls within
               reasoning are reasoning.
    calls      what turns out to be no call, for a bad header or an unknown name, is text, as a
               whole: its marks too. A call whose arguments break off stays a call, with what there
               is; what follows is text.
    several    calls that come although only one is allowed are reported: a constraint is what
               forbids them, and nothing is lost in silence.
    time       linear in the text, whatever it is
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Collection

from services.worker.parsing.call_scanner import HEADER_CHARACTERS_MAX, CallScanner, ScanState
from services.worker.parsing.formats import (
    CALL_OPEN,
    HERMES_CLOSE,
    THINK_CLOSE,
    THINK_OPEN,
    ReasoningFormat,
    ToolFormat,
)
from services.worker.parsing.pieces import CallPiece, Piece, ReasoningPiece, TextPiece

SPACE_HELD_MAX = 64
_SPACE = " \t\r\n"
_SEPARATORS = {ToolFormat.LLAMA3: ";", ToolFormat.MISTRAL: ","}


class _State(enum.Enum):
    """Where in the output it is."""

    TEXT = enum.auto()
    REASONING = enum.auto()
    LIST = enum.auto()  # Behind Mistral's mark: a list has to begin.
    CALL = enum.auto()
    SEPARATOR = enum.auto()  # Behind a call: another may follow.


class OutputParser:
    """Splits one output.

    Attributes:
        in_reasoning: the next character belongs to reasoning.
        has_calls: at least one call has been reported.
    """

    def __init__(
        self,
        *,
        tools: ToolFormat | None,
        tool_names: Collection[str],
        parallel: bool,
        reasoning: ReasoningFormat | None,
        starts_in_reasoning: bool,
        new_call_id: Callable[[int], str],
    ) -> None:
        """Begins an output.

        Args:
            tools: how calls are written; None to look for none.
            tool_names: what may be called.
            parallel: whether several calls are expected; see `has_surplus_calls`.
            reasoning: how reasoning is written; None to look for none.
            starts_in_reasoning: the prompt has opened the reasoning.
            new_call_id: makes the id of the call with a number.
        """
        self._tools = tools
        self._tool_names = frozenset(tool_names)
        self._is_parallel = parallel
        self._has_reasoning = reasoning is not None
        self._new_call_id = new_call_id
        self._call_count = 0
        self._state = _State.TEXT
        # Consumed text that is held; then what was consumed of a call that may be none yet.
        self._tail = ""
        self._lead = ""
        self._scanner = CallScanner(self._tool_names)
        # White space is dropped until something else comes.
        self._skips_space = False
        # Neither text nor a call has come yet.
        self._is_start = True
        # The mark that closes a call which turned out to be none is text as well.
        self._close_is_text = False
        # Behind a call whose closing mark has not come yet.
        self._awaits_close = False
        self._marks: re.Pattern[str] | None = None
        self._mark_texts: tuple[str, ...] = ()
        if starts_in_reasoning and self._has_reasoning:
            self._skips_space = True
            self._enter(_State.REASONING)
        else:
            self._enter(_State.TEXT)

    @property
    def in_reasoning(self) -> bool:
        """Whether the next character belongs to reasoning."""
        return self._state is _State.REASONING

    @property
    def has_calls(self) -> bool:
        """Whether at least one call has been reported."""
        return self._call_count > 0

    @property
    def has_surplus_calls(self) -> bool:
        """Whether several calls came although only one was expected."""
        return self._call_count > 1 and not self._is_parallel

    @property
    def held(self) -> int:
        """Characters at the end that are in no piece and may become something else."""
        if self._state is _State.CALL:
            return len(self._lead) + len(self._scanner.raw)
        return len(self._lead) + len(self._tail)

    def seeks(self, mark: str) -> bool:
        """Tells whether a mark means something where the text has come to."""
        return mark in self._mark_texts

    def push(self, text: str) -> list[Piece]:
        """Takes more text and returns what is certain now, in order."""
        pieces: list[Piece] = []
        text = self._tail + text
        self._tail = ""
        position = 0
        while position < len(text):
            match self._state:
                case _State.CALL:
                    position = self._read_call(text, position, pieces)
                case _State.LIST | _State.SEPARATOR:
                    position = self._read_between(text, position, pieces)
                case _:
                    position = self._read_shown(text, position, pieces)
        return pieces

    def finish(self) -> list[Piece]:
        """Returns everything held, at a natural end. Nothing may be pushed behind it."""
        pieces: list[Piece] = []
        if self._state is _State.CALL:
            self._give_up(pieces)
        elif self._state is _State.LIST:
            self._show(self._lead, pieces)
        elif not (self._awaits_close and HERMES_CLOSE.startswith(self._tail.lstrip(_SPACE))):
            # White space behind a call is dropped, as everywhere around one, and so is the
            # beginning of the mark that closes it.
            self._show(self._tail, pieces)
        self._tail = self._lead = ""
        return pieces

    def _enter(self, state: _State) -> None:
        """Goes on with text or reasoning, and looks for the marks that may stand there."""
        self._state = state
        self._lead = ""
        marks: list[str] = []
        if self._has_reasoning and (state is _State.REASONING or self._is_start):
            marks += [THINK_OPEN, THINK_CLOSE]
        if self._tools is not None and state is _State.TEXT:
            marks.append(CALL_OPEN[self._tools])
            if self._tools is ToolFormat.HERMES:
                marks.append(HERMES_CLOSE)
        self._mark_texts = tuple(marks)
        self._marks = re.compile("|".join(map(re.escape, marks))) if marks else None

    def _show(self, text: str, pieces: list[Piece]) -> None:
        if not text:
            return
        if self._state is _State.REASONING:
            pieces.append(ReasoningPiece(text))
            return
        pieces.append(TextPiece(text))
        self._awaits_close = False
        if self._is_start:
            self._leave_start()

    def _leave_start(self) -> None:
        """From here on reasoning's marks are text."""
        self._is_start = False
        if self._state is _State.TEXT:
            self._enter(_State.TEXT)

    # Text and reasoning.

    def _read_shown(self, text: str, position: int, pieces: list[Piece]) -> int:
        """Reads text or reasoning up to a mark; returns where it stopped."""
        if self._skips_space:
            position = _space_end(text, position)
            if position == len(text):
                return position
            self._skips_space = False
        if self._is_start and self._state is _State.TEXT:
            behind = self._read_start(text, position)
            if behind is not None:
                return behind
        if self._marks is None:
            self._show(text[position:], pieces)
            return len(text)
        found = self._marks.search(text, position)
        if found is None:
            return self._hold_tail(text, position, pieces)
        return self._read_mark(found, text, position, pieces)

    def _read_start(self, text: str, position: int) -> int | None:
        """Looks at how the output begins; None when that decides nothing.

        Llama's calls may come without a mark, as the whole output. And as long as there is nothing
        but white space, it is still the start, for reasoning too.
        """
        behind = _space_end(text, position)
        if behind - position > SPACE_HELD_MAX:
            self._leave_start()
            return None
        if behind == len(text):
            if self._marks is None:
                return None
            self._tail = text[position:]
            return behind
        if self._tools is ToolFormat.LLAMA3 and text[behind] == "{":
            self._begin_call(text[position:behind])
            return behind
        if not self._may_be_mark(text, behind):
            self._leave_start()
        return None

    def _may_be_mark(self, text: str, position: int) -> bool:
        """Whether a mark stands here, or may once there is more text."""
        return any(
            text.startswith(mark, position)
            or mark.startswith(text[position : position + len(mark)])
            for mark in self._mark_texts
        )

    def _hold_tail(self, text: str, position: int, pieces: list[Piece]) -> int:
        """Shows all but what may belong to a mark, which it holds."""
        end = len(text)
        for mark in self._mark_texts:
            # The first character of a mark stands nowhere else in it.
            begun = text.rfind(mark[0], max(position, len(text) - len(mark) + 1))
            if begun >= 0 and mark.startswith(text[begun:]):
                end = min(end, begun)
        shown = _space_begin(text, position, end)
        self._tail = text[shown:]
        self._show(text[position:shown], pieces)
        return len(text)

    def _read_mark(
        self, found: re.Match[str], text: str, position: int, pieces: list[Piece]
    ) -> int:
        mark = found.group()
        self._awaits_close = False
        if mark == HERMES_CLOSE and self._close_is_text:
            self._close_is_text = False
            self._show(text[position : found.end()], pieces)
            return found.end()
        shown = _space_begin(text, position, found.start())
        self._show(text[position:shown], pieces)
        if self._is_start is False and mark in (THINK_OPEN, THINK_CLOSE) and not self.in_reasoning:
            # The text before it was the answer.
            self._show(text[shown : found.end()], pieces)
            return found.end()
        if mark == THINK_OPEN:
            self._enter(_State.REASONING)
        elif mark in (THINK_CLOSE, HERMES_CLOSE):
            self._enter(_State.TEXT)
        else:
            self._begin_call(text[shown : found.end()])
            if self._tools is ToolFormat.MISTRAL:
                self._state = _State.LIST
            return found.end()
        self._skips_space = True
        return found.end()

    # Calls.

    def _begin_call(self, lead: str) -> None:
        self._state = _State.CALL
        self._lead = lead
        self._scanner = CallScanner(self._tool_names)

    def _read_call(self, text: str, position: int, pieces: list[Piece]) -> int:
        scanner = self._scanner
        was_call = scanner.is_call
        position = scanner.feed(text, position)
        if scanner.is_call:
            self._report(pieces, is_first=not was_call)
        if scanner.state is ScanState.DONE:
            self._end_call()
        elif scanner.state is ScanState.BAD:
            self._give_up(pieces)
        return position

    def _report(self, pieces: list[Piece], *, is_first: bool) -> None:
        arguments = self._scanner.take_arguments()
        if is_first:
            self._lead = ""
            self._is_start = False
            index = self._call_count
            self._call_count += 1
            name = self._scanner.name
            pieces.append(CallPiece(index, self._new_call_id(index), name, arguments))
        elif arguments:
            pieces.append(CallPiece(self._call_count - 1, "", "", arguments))

    def _end_call(self) -> None:
        if self._tools is ToolFormat.HERMES:
            self._enter(_State.TEXT)
            self._skips_space = self._awaits_close = True
        else:
            self._state = _State.SEPARATOR
            self._lead = ""

    def _give_up(self, pieces: list[Piece]) -> None:
        """Goes on with text where a call breaks off, or turns out to be none."""
        scanner = self._scanner
        is_call = scanner.is_call
        rest = scanner.raw.lstrip(_SPACE) if is_call else self._lead + scanner.raw
        self._is_start = False
        self._close_is_text = not is_call
        self._awaits_close = is_call
        self._enter(_State.TEXT)
        self._show(rest, pieces)

    def _read_between(self, text: str, position: int, pieces: list[Piece]) -> int:
        """Reads what stands before a list of calls, and between calls."""
        behind = _space_end(text, position)
        if len(self._lead) + behind - position > HEADER_CHARACTERS_MAX:
            behind = position + HEADER_CHARACTERS_MAX - len(self._lead)
        elif behind == len(text):
            self._lead += text[position:]
            return behind
        lead, character = self._lead + text[position:behind], text[behind]
        if self._state is _State.LIST:
            if character == "[":
                self._begin_call(lead + character)
                return behind + 1
            self._enter(_State.TEXT)
            self._show(lead, pieces)
            return behind
        assert self._tools is not None
        if character == _SEPARATORS.get(self._tools):
            self._begin_call(lead + character)
            return behind + 1
        self._enter(_State.TEXT)
        self._skips_space = True
        is_close = self._tools is ToolFormat.MISTRAL and character == "]"
        return behind + is_close


def _space_end(text: str, position: int) -> int:
    """Returns the first place from a position on where no white space stands."""
    end = len(text)
    while position < end and text[position] in _SPACE:
        position += 1
    return position


def _space_begin(text: str, position: int, end: int) -> int:
    """Returns where the white space before a place begins, going back 64 characters at most."""
    begin = end
    limit = max(position, end - SPACE_HELD_MAX)
    while begin > limit and text[begin - 1] in _SPACE:
        begin -= 1
    return begin
