from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.stops import ROOT, StopMatcher, matcher_of

words = st.text("abc", min_size=1, max_size=5)


@settings(deadline=None)
@given(sequences=st.lists(words, min_size=1, max_size=5), text=st.text("abcd", max_size=30))
def test_state_is_the_longest_end_with_which_a_sequence_begins(
    sequences: list[str], text: str
) -> None:
    matcher = StopMatcher(tuple(sequences))
    state = ROOT

    for end, character in enumerate(text, start=1):
        state = matcher.step(state, character)
        begun = [
            size
            for sequence in sequences
            for size in range(1, len(sequence) + 1)
            if text[:end].endswith(sequence[:size])
        ]
        assert matcher.depths[state] == max(begun, default=0)
        complete = [sequence for sequence in sequences if text[:end].endswith(sequence)]
        assert matcher.matches[state] == max(complete, key=len, default=None)


def test_no_sequences_need_no_matcher() -> None:
    assert matcher_of(()) is None
    assert matcher_of(("",)) is None


def test_matchers_are_shared() -> None:
    assert matcher_of(("ab", "c")) is matcher_of(("ab", "c"))
