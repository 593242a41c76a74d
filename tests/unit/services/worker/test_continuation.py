"""What a second worker says behind what a first one released, over real text of the simulator."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine.base import EngineRequest, Sampling
from services.worker.engine.sim_output import SimOutput, base_of
from services.worker.engine.sim_tokenizer import SimTokenizer
from services.worker.stops import matcher_of
from services.worker.text import OutputText, TokenPieces

TOKENIZER = SimTokenizer()
PIECES = TokenPieces.of(TOKENIZER)
OUTPUT = SimOutput(TOKENIZER)
LENGTH = 40

Shown = tuple[list[int], str, str | None]
texts = st.text("abcé€😀 \u0301\ufffd", max_size=20) | st.text(max_size=12)


def show(text: OutputText, token_ids: list[int], *, is_whole: bool) -> Shown:
    """What is released of some tokens, and with the natural end, if that is where they end."""
    releases = [text.push(token_id) for token_id in token_ids]
    if is_whole:
        releases.append(text.finish())
    return (
        [token_id for release in releases for token_id in release.token_ids],
        "".join(release.text for release in releases),
        next((release.stop for release in releases if release.stop is not None), None),
    )


def check_every_cut(token_ids: list[int], sequences: tuple[str, ...]) -> None:
    whole_ids, whole_text, stop = show(
        OutputText(PIECES, matcher_of(sequences)), token_ids, is_whole=True
    )
    for cut in range(len(token_ids) + 1):
        first = OutputText(PIECES, matcher_of(sequences))
        released, before, _ = show(first, token_ids[:cut], is_whole=False)
        second = OutputText(PIECES, matcher_of(sequences))
        is_over = second.prime(released)

        rest_ids, rest, ended_by = show(
            second, [] if is_over else token_ids[len(released) :], is_whole=True
        )

        assert released + rest_ids == whole_ids
        assert before + rest == whole_text
        assert ended_by == stop


@settings(deadline=None)
@given(text=texts, begin=st.integers(0, 12), size=st.integers(1, 6), other=st.text(max_size=3))
def test_any_text_goes_on_from_every_token(text: str, begin: int, size: int, other: str) -> None:
    """With characters cut into bytes, and stop sequences that come and that do not."""
    token_ids = TOKENIZER.encode(text, parse_special=True)

    check_every_cut(token_ids, tuple(filter(None, (text[begin : begin + size], other))))


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**64 - 1), begin=st.integers(0, 200), size=st.integers(1, 12))
def test_what_the_simulator_says_goes_on_from_every_token(seed: int, begin: int, size: int) -> None:
    base = base_of(
        EngineRequest(
            prompt_ids=(1, 2, 3),
            max_output_tokens=LENGTH,
            sampling=Sampling(temperature=1, top_p=1, top_k=0, seed=seed),
        )
    )
    token_ids = OUTPUT.tokens(base, 0, LENGTH).tolist()
    text = b"".join(map(TOKENIZER.token_bytes, token_ids)).decode()

    check_every_cut(token_ids, tuple(filter(None, (text[begin : begin + size], "\u20ac"))))


@pytest.mark.parametrize("count", [1, 7, LENGTH])
@given(
    outputs=st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 40)), min_size=1, max_size=30
    )
)
def test_one_position_has_the_token_that_many_have(
    count: int, outputs: list[tuple[int, int]]
) -> None:
    bases, starts = zip(*outputs, strict=True)

    steps = OUTPUT.steps(bases, starts, count)

    assert [list(column) for column in zip(*steps, strict=True)] == [
        OUTPUT.tokens(base, start, start + count).tolist() for base, start in outputs
    ]
