"""tools/conformance/verdict.py: lines, the summary and the exit code."""

from __future__ import annotations

import pytest

from tools.conformance.verdict import (
    Findings,
    Kind,
    Mismatch,
    Verdict,
    exit_code,
    expect_equal,
    expect_same_text,
    summary,
)

PASSED = Verdict(Kind.PASS, "W-1", "seen")
FAILED = Verdict(Kind.FAIL, "U3", "expected 1, got 2")
SKIPPED = Verdict(Kind.SKIP, "S-9", "needs --kill-worker")


def test_line_is_one_line() -> None:
    assert Verdict(Kind.FAIL, "U3", "two\n lines").line == "FAIL U3 two lines"


def test_part_that_was_not_shown_is_never_passed() -> None:
    findings = Findings(shown=["text equal"], missing=["needs --billing"])

    assert findings.verdict("W-3").line == "SKIP W-3 needs --billing (shown: text equal)"
    assert Findings(shown=["a", "b"]).verdict("W-3").line == "PASS W-3 a; b"


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ([PASSED], 0),
        ([PASSED, SKIPPED], 0),
        ([PASSED, FAILED], 1),
        ([SKIPPED], 1),
        ([], 1),
    ],
)
def test_exit_code_is_0_only_when_something_was_shown(verdicts: list[Verdict], code: int) -> None:
    assert exit_code(verdicts) == code


def test_summary_counts_each_kind() -> None:
    assert summary([PASSED, FAILED, SKIPPED, SKIPPED]) == "1 passed, 1 failed, 2 not shown of 4"


def test_differing_values_are_shown() -> None:
    expect_equal(3, 3, "tokens")
    with pytest.raises(Mismatch, match="tokens: expected 4, got 3"):
        expect_equal(3, 4, "tokens")


def test_differing_outputs_are_placed_and_never_quoted() -> None:
    expect_same_text("same", "same", "text")
    with pytest.raises(Mismatch) as caught:
        expect_same_text("a fox ran", "a fox sat down", "text")

    assert str(caught.value) == (
        "text: expected 14 characters, got 9, the same up to character 6 only"
    )
