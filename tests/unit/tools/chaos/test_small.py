"""What a process on a small disk has said of its cases, and what it has not."""

from __future__ import annotations

from tools.chaos.cases.small import NEEDS, verdicts_of
from tools.conformance.verdict import Kind

NAMES = ["machine-full", "database-full"]


def test_each_case_has_the_verdict_that_was_said_of_it() -> None:
    said = "mounted\n\nPASS machine-full 8 streams\nFAIL database-full\nlogs: /x\n1 of 2\n"

    found = verdicts_of(NAMES, said, 1)

    assert [(item.kind, item.feature, item.text) for item in found] == [
        (Kind.PASS, "machine-full", "8 streams"),
        (Kind.FAIL, "database-full", ""),
    ]


def test_who_cannot_have_a_disk_shows_nothing() -> None:
    found = verdicts_of(NAMES, "", 1)

    assert [(item.kind, item.text) for item in found] == 2 * [(Kind.SKIP, NEEDS)]


def test_a_process_that_broke_has_not_skipped_what_it_was_to_show() -> None:
    found = verdicts_of(NAMES, "mounted\nPASS machine-full 8 streams\n", 1)

    assert [item.kind for item in found] == [Kind.PASS, Kind.FAIL]
    assert "ended with 1" in found[1].text
