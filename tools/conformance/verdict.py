"""What became of a feature: shown, not as promised, or not to be shown here."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

Value = TypeVar("Value")
_TEXT_MAX = 200


class Mismatch(Exception):
    """What was seen is not what is promised; the text says what was expected and what came."""


class CannotShow(Exception):
    """Something is needed that this run was not given; the text says what."""


class Kind(enum.Enum):
    """First word of a line."""

    PASS = "PASS"  # noqa: S105 - no password
    FAIL = "FAIL"
    SKIP = "SKIP"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one feature.

    Attributes:
        kind: shown, refuted, or not shown.
        feature: id, as "W-1".
        text: what was shown with its figures, what was expected and came, or what is missing.
    """

    kind: Kind
    feature: str
    text: str

    @property
    def line(self) -> str:
        """One line for people and for scripts."""
        return f"{self.kind.value} {self.feature} {' '.join(self.text.split())}"


@dataclass(slots=True)
class Findings:
    """What one feature has shown so far, and what it could not.

    Attributes:
        shown: facts with figures.
        missing: parts that need something this run was not given.
    """

    shown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def verdict(self, feature: str) -> Verdict:
        """A part that could not be shown makes the whole a SKIP: it is never passed silently."""
        facts = "; ".join(self.shown)
        if not self.missing:
            return Verdict(Kind.PASS, feature, facts)
        lacks = "; ".join(self.missing)
        return Verdict(Kind.SKIP, feature, f"{lacks} (shown: {facts or 'nothing'})")


def expect(is_so: bool, otherwise: str) -> None:  # noqa: FBT001 - reads as an assertion
    """States what is promised.

    Raises:
        Mismatch: it is not so; with the text.
    """
    if not is_so:
        raise Mismatch(otherwise)


def expect_equal(got: Value, wanted: Value, what: str) -> None:
    """States that something is exactly what is promised.

    Raises:
        Mismatch: it is not; texts are compared by length and place, never quoted: they are output.
    """
    if got == wanted:
        return
    if isinstance(got, str) and isinstance(wanted, str) and max(len(got), len(wanted)) > _TEXT_MAX:
        raise Mismatch(f"{what}: {_difference(got, wanted)}")
    raise Mismatch(f"{what}: expected {wanted!r}, got {got!r}")


def expect_same_text(got: str, wanted: str, what: str) -> None:
    """States that two outputs are the same, without showing either.

    Raises:
        Mismatch: they are not; says where they part.
    """
    if got != wanted:
        raise Mismatch(f"{what}: {_difference(got, wanted)}")


def _difference(got: str, wanted: str) -> str:
    shared = next(
        (at for at, (left, right) in enumerate(zip(got, wanted, strict=False)) if left != right),
        min(len(got), len(wanted)),
    )
    return (
        f"expected {len(wanted)} characters, got {len(got)}, the same up to character {shared} only"
    )


def summary(verdicts: Sequence[Verdict]) -> str:
    """The last line."""
    counts = {kind: sum(verdict.kind is kind for verdict in verdicts) for kind in Kind}
    return (
        f"{counts[Kind.PASS]} passed, {counts[Kind.FAIL]} failed, {counts[Kind.SKIP]} not shown"
        f" of {len(verdicts)}"
    )


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """0 when something was shown and nothing refuted; a run that showed nothing is no success."""
    kinds = {verdict.kind for verdict in verdicts}
    return 0 if Kind.PASS in kinds and Kind.FAIL not in kinds else 1
