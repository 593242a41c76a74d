"""Points in the code where a test may have a process die, halt, fail or be slow.

For campaigns that show what survives (`make chaos`), never for production: a process refuses to
start with points in its configuration unless `failpoints.allow` stands beside them. Without any, a
point costs one look at an empty table.

A rule is "point=action@n": at the n-th time that the process comes to the point, it kills itself,
halts until somebody continues it, fails as if a dependency were away, or sleeps. With a folder for
marks each rule acts once over all lives of a process: it leaves a file there before it acts, and is
void when the file is there. So one configuration leads a process through many deaths.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from typing_extensions import override

from libs.errors import unavailable

SLEEP_S = 1.0
"""How long a process is held up by "sleep"; its event loop stands still."""
_RULE = re.compile(r"(?P<point>[a-z_.]+)=(?P<action>[a-z]+)@(?P<time>[1-9]\d{0,8})")


class Point(enum.StrEnum):
    """Every point that there is."""

    SLICE_NOTED = "slice.noted"
    """A gateway has noted a slice and has not asked for it."""
    SLICE_ANSWERED = "slice.answered"
    """A slice was granted; the gateway that asked does not know of it yet."""
    JOURNAL_OPENED = "journal.opened"
    """An accepted generation is in the journal; its client has not heard of it."""
    RELEASE_COUNTED = "release.counted"
    """Counts are in the journal; nothing of them was sent."""
    JOURNAL_CLOSED = "journal.closed"
    """An end is in the journal; it is neither sent nor settled."""
    SETTLE_ANSWERED = "settle.answered"
    """Settlements are durable; the gateway's journal still has them."""
    SLICES_CLOSING = "slices.closing"
    """Slices are about to be given back."""
    SLICES_CLOSED = "slices.closed"
    """Slices were given back; the gateway's journal still has them."""
    REPLAY_READ = "replay.read"
    """An earlier journal was read; nothing of it is settled."""
    REPLAY_SETTLED = "replay.settled"
    """All of an earlier journal is settled; its files are still there."""
    GRANT_WRITTEN = "grant.written"
    """Billing has written a slice and has not committed it."""
    SETTLE_WRITTEN = "settle.written"
    """Billing has written a batch of settlements and has not committed it."""
    SETTLE_COMMITTED = "settle.committed"
    """Billing has committed a batch of settlements and has not answered."""
    CLOSE_WRITTEN = "close.written"
    """Billing has freed slices and has not committed it."""
    CLOSE_COMMITTED = "close.committed"
    """Billing has committed that slices are free and has not answered."""


class Action(enum.StrEnum):
    """What happens at a point."""

    KILL = "kill"
    STOP = "stop"
    ERROR = "error"
    SLEEP = "sleep"


class BadRule(ValueError):
    """The text is no rule, or names what there is not."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """One thing that happens.

    Attributes:
        point: where.
        action: what.
        time: at which passage of the process, from 1.
    """

    point: Point
    action: Action
    time: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads "journal.opened=kill@3".

        Raises:
            BadRule: it is none.
        """
        match = _RULE.fullmatch(text)
        if match is None:
            raise BadRule(f'{text!r} is no rule: must be as "journal.opened=kill@3"')
        try:
            return cls(Point(match["point"]), Action(match["action"]), int(match["time"]))
        except ValueError as error:
            raise BadRule(f"{text!r}: {error}") from error

    @override
    def __str__(self) -> str:
        return f"{self.point.value}={self.action.value}@{self.time}"


@dataclasses.dataclass(slots=True)
class _Armed:
    """The rules of a point, and how often the process was there."""

    rules: list[Rule] = dataclasses.field(default_factory=list)
    passages: int = 0


# Of the process, as signals are: points lie deep in code that knows no configuration.
_armed: dict[Point, _Armed] = {}
_marks: list[Path] = []


def arm(rules: Iterable[Rule], marks: Path | None) -> None:
    """Sets what happens from now on, instead of what was set before.

    Args:
        rules: all of them; none switches every point off.
        marks: folder where each rule leaves a file named after itself before it acts; None has it
            act again in every life of the process.
    """
    _armed.clear()
    for rule in rules:
        if marks is None or not (marks / str(rule)).exists():
            _armed.setdefault(rule.point, _Armed()).rules.append(rule)
    _marks[:] = [] if marks is None else [marks]


def hit(point: Point) -> None:
    """Says that the process is at a point.

    Raises:
        Unavailable: a rule asks for it.
    """
    if _armed:
        _pass(point)


def _pass(point: Point) -> None:
    armed = _armed.get(point)
    if armed is None:
        return
    armed.passages += 1
    for rule in armed.rules:
        if rule.time == armed.passages and _leave_marks(rule):
            _act(rule)


def _leave_marks(rule: Rule) -> bool:
    """Leaves the mark of a rule; False when another process was faster."""
    for folder in _marks:
        try:
            os.close(os.open(folder / str(rule), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return False
    return True


def _act(rule: Rule) -> None:
    # The log may be buffered, and there is no later.
    with contextlib.suppress(OSError):
        os.write(2, f"failpoint {rule}\n".encode())
    match rule.action:
        case Action.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case Action.STOP:
            os.kill(os.getpid(), signal.SIGSTOP)
        case Action.ERROR:
            raise unavailable(f"failpoint {rule.point.value}")
        case Action.SLEEP:
            time.sleep(SLEEP_S)
