"""What ends an output before its model does: stop tokens and stop texts."""

from __future__ import annotations

import itertools
from dataclasses import replace

from services.worker.engine.base import Ended, EndReason, EngineRequest
from tools.conformance.engine.check import Book
from tools.conformance.engine.harness import Harness, ask, seeded
from tools.conformance.verdict import CannotShow, expect, expect_equal

STOPS = Book("stops")
_TOKENS = 24


@STOPS.check()
async def stop_token_ids_end_the_output_and_are_not_in_it(harness: Harness) -> None:
    """An output ends before its stop token, and says which it was."""
    whole, _ = await harness.run(1, ask(_TOKENS))
    stop = whole[5]

    token_ids, ended = await harness.run(2, ask(_TOKENS, stops=frozenset({stop})))

    harness.expect_same(token_ids, whole[: whole.index(stop)], "what stands before the stop token")
    expect(ended == Ended(2, EndReason.STOP_TOKEN, stop), "the end does not name the stop token")


@STOPS.cases({"ignored": ask(_TOKENS), "heeded": ask(_TOKENS, ignore_eos=False)})
async def a_stop_token_ends_the_output_wherever_it_comes(
    harness: Harness, request: EngineRequest
) -> None:
    """Each token of an output, the first included, ends it, whatever the end of sequence does."""
    whole, _ = await harness.run(100, request)
    stops = dict(enumerate(dict.fromkeys(whole)))

    for lane, stop in stops.items():
        harness.submit(lane, replace(request, stop_token_ids=frozenset({stop})))
    await harness.until_ended(*stops)

    for lane, stop in stops.items():
        place = whole.index(stop)
        harness.expect_same(harness.told[lane].token_ids, whole[:place], f"stopped at {place}")
        expect(
            harness.end_of(lane) == Ended(lane, EndReason.STOP_TOKEN, stop),
            f"stopped at {place}: the end does not name the stop token",
        )


@STOPS.check()
async def the_first_of_several_stop_tokens_ends_the_output(harness: Harness) -> None:
    """Of four stop tokens the one that comes first counts; others that never come do not."""
    whole, _ = await harness.run(1, ask(_TOKENS))
    absent = next(token_id for token_id in range(60, 120) if token_id not in whole)
    stops = frozenset({*whole[9:12], absent})
    place = next(at for at, token_id in enumerate(whole) if token_id in stops)

    token_ids, ended = await harness.run(2, ask(_TOKENS, stops=stops))

    harness.expect_same(token_ids, whole[:place], "what stands before the first")
    expect(ended == Ended(2, EndReason.STOP_TOKEN, whole[place]), "another stop token was named")


@STOPS.check()
async def a_stop_token_in_prompt_or_continuation_ends_nothing(harness: Harness) -> None:
    """Only tokens that are drawn can stop an output."""
    request = ask(_TOKENS, sampling=seeded(2))
    whole, _ = await harness.run(1, request)
    absent = next(
        (token_id for token_id in (*request.prompt_ids, *whole[:4]) if token_id not in whole[4:]),
        None,
    )
    if absent is None:
        raise CannotShow("the output repeats all tokens of its prompt")
    continued = replace(
        request,
        prompt_ids=(*request.prompt_ids, absent),
        continue_ids=(absent,),
        stop_token_ids=frozenset({absent}),
        max_output_tokens=3,
    )

    token_ids, ended = await harness.run(2, continued)

    if ended.reason is EndReason.STOP_TOKEN:
        raise CannotShow("the model drew the stop token itself")
    expect_equal(len(token_ids), 2, "tokens behind a continuation of one, of three")


@STOPS.check()
async def an_engine_that_sees_a_stop_text_delivers_all_of_it(harness: Harness) -> None:
    """A stop text within one token or over several ends an output behind it, or not at all."""
    whole, _ = await harness.run(100, ask(_TOKENS))
    requests: dict[int, EngineRequest] = {}
    for start in range(0, _TOKENS - 3, 2):
        for count in (1, 2, 3):
            text = harness.text_of(whole[start : start + count])
            if text.isascii() and text.strip():
                requests[len(requests)] = replace(ask(_TOKENS), stop_texts=(text,))
    if not requests:
        raise CannotShow("no token of the output stands for whole characters")

    for lane, request in requests.items():
        harness.submit(lane, request)
    await harness.until_ended(*requests)

    for lane, request in requests.items():
        token_ids, ended = harness.told[lane].token_ids, harness.end_of(lane)
        harness.expect_same(token_ids, whole[: len(token_ids)], "up to the stop text")
        if len(token_ids) < _TOKENS:
            expect_equal(ended.reason, EndReason.END_OF_SEQUENCE, "end at a stop text")
            expect(
                request.stop_texts[0] in harness.text_of(token_ids),
                "the output ended before all tokens of the stop text had come",
            )


@STOPS.check()
async def a_stop_text_over_half_a_token_harms_nothing(harness: Harness) -> None:
    """A stop text that begins and ends inside of tokens leaves every token up to it as it is."""
    whole, _ = await harness.run(100, ask(_TOKENS))
    texts = [harness.text_of([token_id]) for token_id in whole]
    pairs = [
        first[-1:] + second[:1]
        for first, second in itertools.pairwise(texts)
        if first.isascii() and second.isascii() and first and second
    ]
    if not pairs:
        raise CannotShow("no two tokens of the output stand for whole characters")

    for lane, text in enumerate(pairs):
        harness.submit(lane, replace(ask(_TOKENS), stop_texts=(text,)))
    await harness.until_ended(*range(len(pairs)))

    for lane, text in enumerate(pairs):
        token_ids = harness.told[lane].token_ids
        harness.expect_same(token_ids, whole[: len(token_ids)], "up to the stop text")
        if len(token_ids) < _TOKENS:
            expect(text in harness.text_of(token_ids), "the output ended without its stop text")
