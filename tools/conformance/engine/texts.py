"""What comes out of an engine as text, through the worker's own text layer."""

from __future__ import annotations

from maas.inference.v1 import generation_pb2

from services.worker.engine.base import ConstraintKind
from tools.conformance.engine.check import Book, constraint
from tools.conformance.engine.harness import Harness
from tools.conformance.engine.speaking import Said, execution, speaking
from tools.conformance.verdict import CannotShow, Mismatch, expect, expect_equal, expect_same_text

TEXTS = Book("text")
_TOKENS = 40
_STOPS_MAX = 30
_LETTERS = "[à-üЖ-я一-十]{14}"
_LETTERS_TOKENS = 100
_REGEX = constraint(ConstraintKind.REGEX)
_SAMPLES = (
    "Once upon a time",
    " two  spaces, a\ttab\nand a line",
    "größer, naïve, Ærøskøbing",
    "Ελληνικά и русский",
    "日本語と한국어",
    "a 👩🏽‍🚀 in the snow ❄️",
    '{"name": "add", "n": [1, 2.5]}',
)


@TEXTS.check()
async def a_text_becomes_token_ids_and_back(harness: Harness) -> None:
    """Texts of one to four bytes a character come back as they were, from every engine."""
    async with speaking(harness) as speaker:
        for number, text in enumerate(_SAMPLES):
            token_ids = await speaker.tokens_of(text)
            expect(len(token_ids) > 0, f"sample {number} has no token")
            expect_same_text(await speaker.text_of(token_ids), text, f"sample {number}")


@TEXTS.check()
async def the_text_of_an_output_is_that_of_its_tokens(harness: Harness) -> None:
    """What was released as text is what Detokenize makes of the released tokens."""
    async with speaking(harness) as speaker:
        asked = [execution(_TOKENS), *(execution(_TOKENS, seed=seed) for seed in range(1, 5))]
        for said in await speaker.say(*asked):
            expect(said.end.reason != generation_pb2.FINISH_REASON_UNSPECIFIED, "no end")
            if said.token_ids:
                wanted = await speaker.text_of(said.token_ids)
                expect(said.text.startswith(wanted), "text and released tokens differ")


@TEXTS.check()
async def a_stop_text_ends_an_output_wherever_it_stands(harness: Harness) -> None:
    """Stop texts that begin and end inside of tokens: the text ends before the first of them."""
    await _stop_everywhere(harness, regex="", tokens=_TOKENS)


@TEXTS.check(_REGEX)
async def a_stop_text_of_several_bytes_a_character_ends_an_output(harness: Harness) -> None:
    """The same with characters that are split over tokens: no half of one is shown."""
    whole = await _stop_everywhere(harness, regex=_LETTERS, tokens=_LETTERS_TOKENS)
    expect(not whole.isascii(), "the output has no characters of several bytes")
    expect("\N{REPLACEMENT CHARACTER}" not in whole, "a character was shown in halves")


@TEXTS.check()
async def a_text_that_only_begins_like_a_stop_is_delivered(harness: Harness) -> None:
    """What was held back because a stop could have followed comes with the end."""
    async with speaking(harness) as speaker:
        (whole,) = await speaker.say(execution(_TOKENS))
        if not whole.text:
            raise CannotShow("the output has no text")
        stop = f"{whole.text[-3:]}\N{SNOWMAN} and so on"

        (again,) = await speaker.say(execution(_TOKENS, stops=[stop]))

        _expect_repeated(harness, again.text, whole.text)
        expect_equal(again.end.reason, whole.end.reason, "end")


async def _stop_everywhere(harness: Harness, *, regex: str, tokens: int) -> str:
    """Stops an output at many of its texts; returns the whole."""
    seed = 3 if regex else None
    async with speaking(harness) as speaker:
        (whole,) = await speaker.say(execution(tokens, regex=regex, seed=seed))
        stops = _stops_in(whole.text)
        if not stops:
            raise CannotShow("the output is too short to be stopped")
        found = await speaker.say(
            *(execution(tokens, regex=regex, seed=seed, stops=[stop]) for stop in stops)
        )
    for stop, said in zip(stops, found, strict=True):
        _expect_stopped(harness, said, stop, whole.text)
    return whole.text


def _stops_in(text: str) -> list[str]:
    """Texts of one to five characters from all over a text, and each but once."""
    found = {
        text[start : start + length]: None
        for start in range(len(text))
        for length in (1 + start % 5,)
        if start + length <= len(text)
    }
    step = max(1, len(found) // _STOPS_MAX)
    return list(found)[::step]


def _expect_stopped(harness: Harness, said: Said, stop: str, whole: str) -> None:
    _expect_repeated(harness, said.text, whole[: whole.index(stop)])
    expect(stop not in said.text, "a stop text was shown")
    expect_equal(said.end.reason, generation_pb2.FINISH_REASON_STOP_SEQUENCE, "end")
    expect(said.end.stop_sequence == stop, "the end does not name the stop text")


def _expect_repeated(harness: Harness, got: str, wanted: str) -> None:
    try:
        expect_same_text(got, wanted, "the text up to the stop")
    except Mismatch as mismatch:
        if harness.info.is_deterministic or harness.row.is_repeatable:
            raise
        raise CannotShow(f"{mismatch}, and this engine does not promise the same") from None
