"""What an output is: its order, its tokens, where it ends by itself."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from services.worker.engine.base import Ended, EndReason, Sampling
from tools.conformance.engine.check import IGNORE_EOS, Book
from tools.conformance.engine.harness import GREEDY, PROMPT, Harness, ask, seeded
from tools.conformance.engine.rows import CAPACITY, CONTEXT_LENGTH
from tools.conformance.verdict import CannotShow, expect, expect_equal

LIFE = Book("life")
_SEEDS = (0, 1, 1 << 32, (1 << 63) + 1, (1 << 64) - 1)


@LIFE.check()
async def info_describes_what_was_asked_for(harness: Harness) -> None:
    """An engine has the places and the context it was made with, and says what it promises."""
    info = harness.info
    expect_equal(info.max_running, CAPACITY, "places")
    expect_equal(info.context_length, CONTEXT_LENGTH, "context length")
    expect(info.vocabulary_size > 0, "the vocabulary is empty")
    expect_equal(info.is_deterministic, harness.row.is_deterministic, "is_deterministic")


@LIFE.check()
async def prompt_is_prefilled_then_tokens_come_then_one_end(harness: Harness) -> None:
    """Seven tokens that were asked for come behind one prefill and before one end."""
    token_ids, ended = await harness.run(1, ask(7))

    expect_equal(len(token_ids), 7, "tokens")
    expect_equal(ended, Ended(1, EndReason.MAX_TOKENS), "end")
    expect_equal(harness.told[1].prefilled, 1, "prefills")


@LIFE.check()
async def nothing_comes_behind_the_end(harness: Harness) -> None:
    """While another execution runs, one that has ended stays silent."""
    await harness.run(1, ask(3))

    await harness.run(2, ask(20))

    expect_equal(len(harness.told[1].token_ids), 3, "tokens")


@LIFE.check()
async def a_lane_may_be_used_again_after_its_end(harness: Harness) -> None:
    """The second execution on a lane is told like the first."""
    first, _ = await harness.run(1, ask(4))

    second, _ = await harness.run(1, ask(4))

    harness.expect_same(second, first, "the second output on one lane")


@LIFE.check()
async def each_token_is_told_once_whatever_the_length(harness: Harness) -> None:
    """Outputs of 1 to 24 tokens, side by side, are beginnings of one: none is lost or repeated."""
    whole, _ = await harness.run(100, ask(24))
    lanes = range(1, 25)

    for lane in lanes:
        harness.submit(lane, ask(lane))
    await harness.until_ended(*lanes)

    for lane in lanes:
        expect_equal(harness.end_of(lane).reason, EndReason.MAX_TOKENS, "end")
        harness.expect_same(harness.told[lane].token_ids, whole[:lane], f"{lane} tokens")


@LIFE.check()
async def same_seed_gives_the_same_tokens(harness: Harness) -> None:
    """An output that is left to chance comes again with its seed."""
    first, _ = await harness.run(1, ask(24, sampling=seeded(7)))

    second, _ = await harness.run(2, ask(24, sampling=seeded(7)))

    harness.expect_same(second, first, "the same seed")


@LIFE.check()
async def other_seeds_give_other_tokens(harness: Harness) -> None:
    """Four seeds do not all give the same output."""
    outputs = [(await harness.run(seed, ask(24, sampling=seeded(seed))))[0] for seed in range(1, 5)]

    expect(len({tuple(output) for output in outputs}) > 1, "four seeds gave one output")


@LIFE.check()
async def seeds_have_64_bits(harness: Harness) -> None:
    """Seeds up to the largest are taken, and those that differ above bit 31 give other tokens."""
    found: dict[int, tuple[int, ...]] = {}
    for lane, seed in enumerate(_SEEDS):
        token_ids, ended = await harness.run(lane, ask(24, sampling=seeded(seed)))
        expect_equal(ended.reason, EndReason.MAX_TOKENS, f"end with seed {seed}")
        found[seed] = tuple(token_ids)

    expect_equal(len(set(found.values())), len(_SEEDS), "different outputs of different seeds")


@LIFE.check()
async def other_prompts_give_other_tokens(harness: Harness) -> None:
    """The prompt matters."""
    first, _ = await harness.run(1, ask(24))

    second, _ = await harness.run(2, ask(24, prompt=(*PROMPT, 33, 33)))

    if second == first and not harness.row.is_repeatable:
        raise CannotShow("this model says the same to both prompts")
    expect(second != first, "two prompts gave one output")


@LIFE.check()
async def temperature_0_knows_no_seed(harness: Harness) -> None:
    """The likeliest tokens are the same with every seed."""
    outputs = [
        (await harness.run(seed, ask(24, sampling=replace(GREEDY, seed=seed))))[0]
        for seed in (1, 2)
    ]

    harness.expect_same(outputs[1], outputs[0], "another seed at temperature 0")


@LIFE.check()
async def company_does_not_change_the_output(harness: Harness) -> None:
    """Outputs that fill the batch are what they are alone."""
    alone = {
        lane: (await harness.run(lane, ask(16, sampling=seeded(lane))))[0] for lane in (2, 3, 4)
    }

    for lane in alone:
        harness.submit(lane, ask(16, sampling=seeded(lane)))
    await harness.until_ended(*alone)

    for lane, wanted in alone.items():
        harness.expect_same(harness.told[lane].token_ids, wanted, "an output in company")


_SAMPLINGS = {"greedy": GREEDY, "seeded": seeded(5)}


@LIFE.cases(
    {
        f"{name}-{lost_at}": (_SAMPLINGS[name], lost_at)
        for name, lost_at in product(_SAMPLINGS, (1, 9, 23))
    }
)
async def a_continuation_equals_the_uninterrupted_run(
    harness: Harness, case: tuple[Sampling, int]
) -> None:
    """What another worker goes on with is what the first would have said."""
    sampling, lost_at = case
    if sampling.temperature:
        harness.require_deterministic()
    whole, _ = await harness.run(1, ask(24, sampling=sampling))

    rest, ended = await harness.run(2, ask(24, continues=tuple(whole[:lost_at]), sampling=sampling))

    harness.expect_same(rest, whole[lost_at:], "the rest")
    expect_equal(ended.reason, EndReason.MAX_TOKENS, "end")


@LIFE.check()
async def a_continuation_from_every_place_equals_the_uninterrupted_run(harness: Harness) -> None:
    """From 0 to the last token and the stop token behind it, in the company of other places."""
    harness.require_deterministic()
    drawn, _ = await harness.run(1, ask(24, sampling=seeded(11)))
    stop = next(token for token in reversed(drawn) if drawn.index(token) > 8)  # noqa: PLR2004
    request = ask(24, sampling=seeded(11), stops=frozenset({stop}))
    whole, end = await harness.run(2, request)
    expect_equal(end.reason, EndReason.STOP_TOKEN, "end")
    lanes = {100 + cut: cut for cut in range(len(whole) + 1)}

    for lane, cut in lanes.items():
        harness.submit(lane, replace(request, continue_ids=tuple(whole[:cut])))
    await harness.until_ended(*lanes)

    for lane, cut in lanes.items():
        harness.expect_same(harness.told[lane].token_ids, whole[cut:], f"the rest from {cut}")
        expect(
            harness.end_of(lane) == Ended(lane, EndReason.STOP_TOKEN, stop),
            f"the rest from {cut} did not end with the stop token",
        )


@LIFE.check()
async def full_context_ends_the_output(harness: Harness) -> None:
    """Prompt and output fill the context to its last token."""
    prompt = PROMPT * 24

    token_ids, ended = await harness.run(1, ask(1000, prompt=prompt))

    expect_equal(len(prompt) + len(token_ids), CONTEXT_LENGTH, "prompt and output")
    expect_equal(ended.reason, EndReason.CONTEXT_FULL, "end")


@LIFE.check()
async def the_longest_prompt_leaves_room_for_one_token(harness: Harness) -> None:
    """A prompt that is one token shorter than the context gets one token."""
    prompt = (PROMPT * 26)[: CONTEXT_LENGTH - 1]

    token_ids, ended = await harness.run(1, ask(1, prompt=prompt))

    expect_equal(len(token_ids), 1, "tokens")
    expect_equal(ended.reason, EndReason.MAX_TOKENS, "end")
    expect_equal(len((await harness.run(2, ask(5)))[0]), 5, "tokens of the next")


@LIFE.check()
async def a_prompt_of_one_token_is_enough(harness: Harness) -> None:
    """The shortest prompt gets the shortest output."""
    token_ids, ended = await harness.run(1, ask(1, prompt=PROMPT[:1]))

    expect_equal(len(token_ids), 1, "tokens")
    expect_equal(ended.reason, EndReason.MAX_TOKENS, "end")


@LIFE.check(IGNORE_EOS)
async def ignore_eos_goes_on_to_the_last_token(harness: Harness) -> None:
    """No end of sequence ends an output that is to go on."""
    for lane in range(1, 4):
        harness.submit(lane, ask(100, sampling=seeded(lane)))
    await harness.until_ended(1, 2, 3)

    lengths = [len(harness.told[lane].token_ids) for lane in (1, 2, 3)]
    expect_equal(lengths, [100] * 3, "tokens")


@LIFE.check()
async def an_output_ends_by_itself_without_its_end_token(harness: Harness) -> None:
    """Outputs that end by themselves say so, and are the beginning of one that goes on."""
    ends = 0
    for seed in range(8):
        token_ids, ended = await harness.run(1, ask(90, sampling=seeded(seed), ignore_eos=False))
        if ended.reason is not EndReason.END_OF_SEQUENCE:
            expect_equal(ended.reason, EndReason.MAX_TOKENS, "end")
            continue
        ends += 1
        expect(ended.stop_token_id is None, "the end of sequence was called a stop token")
        longer, _ = await harness.run(2, ask(90, sampling=seeded(seed)))
        harness.expect_same(longer[: len(token_ids)], token_ids, "the same, going on")
    if not ends:
        raise CannotShow("this model ended none of eight outputs by itself")
