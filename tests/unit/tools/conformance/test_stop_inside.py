"""tools/conformance/delivery.py: the stop sequence that is looked for in an output."""

from __future__ import annotations

import pytest

from tools.conformance.delivery import stop_inside
from tools.conformance.verdict import Mismatch


def test_stop_stands_for_the_first_time_in_the_second_half() -> None:
    text = "the cat sat and the cat sat on a warm mat today"

    at, stop = stop_inside(text, 8)

    assert text.find(stop) == at >= len(text) // 2
    assert " " in stop.strip()
    assert len(stop) == 8


def test_text_that_repeats_itself_has_no_stop() -> None:
    with pytest.raises(Mismatch):
        stop_inside("ab " * 40, 8)
