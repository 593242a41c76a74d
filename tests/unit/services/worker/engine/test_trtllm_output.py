"""What is new, what is shown, and how it ended."""

from __future__ import annotations

import pytest

from services.worker.engine.base import (
    Constraint,
    ConstraintKind,
    Ended,
    EndReason,
    EngineRequest,
    Sampling,
)
from services.worker.engine.trtllm_output import Bounds, Output, bounds_of

EOS, OTHER_EOS, STOP = 2, 3, 50
ENDS = frozenset({EOS, OTHER_EOS})
ANY = Sampling(temperature=1, top_p=1, top_k=0, seed=1)
REGEX = Constraint(kind=ConstraintKind.REGEX, source="a", grammar="start: /a/")


def bounds(**changed: object) -> Bounds:
    fields: dict[str, object] = {
        "lane": 7,
        "room": 5,
        "drawn": 5,
        "at_room": EndReason.MAX_TOKENS,
        "end_ids": ENDS,
        "stop_ids": frozenset({STOP}),
        **changed,
    }
    return Bounds(**fields)  # type: ignore[arg-type] # any of them


def ask(**changed: object) -> EngineRequest:
    fields: dict[str, object] = {
        "prompt_ids": (9,) * 10,
        "max_output_tokens": 8,
        "sampling": ANY,
        **changed,
    }
    return EngineRequest(**fields)  # type: ignore[arg-type] # any of them


def made(request: EngineRequest, context_length: int = 100) -> Bounds:
    return bounds_of(7, request, context_length=context_length, end_ids=ENDS)


def test_only_what_is_new_is_told() -> None:
    output, whole = Output(bounds()), [11]

    told = [list(output.take(whole))]
    whole += [12, 13]
    told += [list(output.take(whole)), list(output.take(whole))]

    assert told == [[11], [12, 13], []]


def test_a_list_that_shrinks_takes_nothing_back_and_repeats_nothing() -> None:
    output = Output(bounds())
    output.take([11, 12, 13])

    assert list(output.take([11])) == []
    assert list(output.take([11, 12, 13, 14])) == [14]
    assert output.shown == 4


@pytest.mark.parametrize("end", sorted(ENDS))
def test_an_end_is_not_shown_and_nothing_comes_behind_it(end: int) -> None:
    output = Output(bounds())

    assert list(output.take([11, end, 12])) == [11]
    assert list(output.take([11, end, 12, 13])) == []
    assert output.is_cut
    assert output.end("stop", is_aborted=False) == Ended(7, EndReason.END_OF_SEQUENCE)


def test_a_stop_token_is_named_and_not_shown() -> None:
    output = Output(bounds())

    assert list(output.take([11, STOP])) == [11]
    assert output.end("stop", is_aborted=False) == Ended(7, EndReason.STOP_TOKEN, STOP)


def test_a_stop_token_that_is_the_last_token_is_a_stop_and_no_lack_of_room() -> None:
    output = Output(bounds(room=2))

    assert list(output.take([11, STOP])) == [11]
    assert output.end("length", is_aborted=False) == Ended(7, EndReason.STOP_TOKEN, STOP)


def test_an_engine_that_goes_on_after_the_end_is_cut_there_when_it_was_told_to_stop() -> None:
    output = Output(bounds())
    output.take([11, STOP])

    assert output.end("cancelled", is_aborted=True) == Ended(7, EndReason.STOP_TOKEN, STOP)


def test_no_more_is_told_than_there_is_room_for() -> None:
    output = Output(bounds(room=2))

    assert list(output.take([11, 12, 13])) == [11, 12]
    assert output.end("length", is_aborted=False) == Ended(7, EndReason.MAX_TOKENS)


@pytest.mark.parametrize(
    ("finish_reason", "tokens", "reason"),
    [
        ("stop", 3, EndReason.END_OF_SEQUENCE),
        ("length", 5, EndReason.MAX_TOKENS),
        ("length", 3, EndReason.CONTEXT_FULL),
        ("timeout", 3, EndReason.FAILED),
        ("cancelled", 3, EndReason.FAILED),
        ("something new", 3, EndReason.FAILED),
        (None, 5, EndReason.MAX_TOKENS),
        (None, 3, EndReason.FAILED),
    ],
)
def test_reasons_of_the_engine_become_ours(
    finish_reason: str | None, tokens: int, reason: EndReason
) -> None:
    output = Output(bounds())
    output.take(list(range(100, 100 + tokens)))

    ended = output.end(finish_reason, is_aborted=False)

    assert ended.reason is reason
    assert bool(ended.message) == (reason is EndReason.FAILED)


def test_what_was_aborted_is_aborted_whatever_the_engine_says() -> None:
    for finish_reason in ("cancelled", "stop", "length", None):
        assert Output(bounds()).end(finish_reason, is_aborted=True) == Ended(7, EndReason.ABORTED)


def test_room_is_what_is_left_of_the_output_and_of_the_context() -> None:
    assert made(ask()).room == 8
    assert made(ask(continue_ids=(1, 1, 1))).room == 5
    assert made(ask(continue_ids=(1,) * 8)).room == 0
    full = made(ask(), context_length=14)
    assert (full.room, full.at_room) == (4, EndReason.CONTEXT_FULL)


def test_ends_are_ignored_where_that_is_asked_for_but_never_under_a_constraint() -> None:
    assert made(ask(ignore_eos=True)).end_ids == frozenset()
    assert made(ask(ignore_eos=True, constraint=REGEX)).end_ids == ENDS


def test_under_a_constraint_there_is_room_for_the_end_itself() -> None:
    """Else nobody could tell whether an output of exactly so many tokens was complete."""
    exact = made(ask(constraint=REGEX))
    output = Output(exact)

    shown = output.take([*range(100, 108), EOS])

    assert (exact.room, exact.drawn) == (8, 9)
    assert len(shown) == 8
    assert output.end("stop", is_aborted=False).reason is EndReason.END_OF_SEQUENCE
    assert made(ask(constraint=REGEX), context_length=18).drawn == 8
