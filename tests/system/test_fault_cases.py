"""One thing goes wrong at a time, with real processes; `python -m tools.chaos.cases` has more."""

from __future__ import annotations

import asyncio

from tools.chaos.cases import table
from tools.chaos.cases.ground import own_ground
from tools.conformance.verdict import Kind


def test_every_token_is_charged_once_whatever_goes_wrong() -> None:
    """On one suite, one case after the other: each has to leave it whole."""
    cases = [case for case in table.QUICK if case.is_cheap]
    said: list[str] = []

    with own_ground(*table.QUICK_SETTINGS) as state:
        verdicts = asyncio.run(table.run(state, cases, said.append))

    assert {verdict.kind for verdict in verdicts} == {Kind.PASS}, "\n".join(said)
