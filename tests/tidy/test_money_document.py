"""The tables of docs/money.md are those that the code goes by."""

from __future__ import annotations

import pytest

from services.billing.domain import CHARGE_RULES, EndCause
from services.billing.invariants import INVARIANTS, Invariant
from tests.tidy.repository import ROOT

LINES_MAX = 150
LINES = (ROOT / "docs" / "money.md").read_text(encoding="utf-8").splitlines()


def rows(first: str) -> list[list[str]]:
    """Cells of the rows that begin with a word."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES]
    return [row for row in cells if row[0] == first]


@pytest.mark.parametrize("cause", EndCause)
def test_the_written_rule_of_an_end_is_the_one_that_is_charged_by(cause: EndCause) -> None:
    rule = CHARGE_RULES[cause]

    assert rows(cause.name) == [[cause.name, "yes" if rule.is_charged else "no", rule.why]]


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda item: item.invariant_id)
def test_the_written_invariant_is_the_one_that_the_auditor_names(invariant: Invariant) -> None:
    wanted = [invariant.invariant_id, invariant.sentence, invariant.outside]

    assert rows(invariant.invariant_id) == [wanted]


def test_the_document_is_short() -> None:
    assert len(LINES) <= LINES_MAX
