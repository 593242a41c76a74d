"""Running executions: who starts, what is told, who ends. The engine says what a test lets it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import pytest

from services.worker.engine.base import (
    AdapterUnusable,
    Constraint,
    ConstraintKind,
    Ended,
    EndReason,
    EngineRequest,
    Lane,
    Prefilled,
    Sampling,
    StepBatch,
)
from services.worker.engine.trtllm_guided import ConstraintUnusable
from services.worker.engine.trtllm_lanes import Guide, Lanes
from services.worker.engine.trtllm_requests import Guides, Requests
from services.worker.engine.trtllm_state import LaneLimits
from services.worker.engine.wire import Counters, Report, pack_step, unpack_step

EOS = 2
FRAME = 5
PLAIN = EngineRequest(
    prompt_ids=(9, 9, 9),
    max_output_tokens=8,
    sampling=Sampling(temperature=1, top_p=1, top_k=0, seed=5),
)
REGEX = Constraint(kind=ConstraintKind.REGEX, source="a", grammar="start: /a/")
LIMITS = LaneLimits(capacity=2, context_length=100, end_ids=frozenset({EOS}))


class RequestError(RuntimeError):
    """One request has failed."""


class EngineDeadError(RequestError):
    """The engine has died, whatever else it calls it."""


@dataclass
class Completion:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[object] = field(default_factory=list)
    prompt_logprobs: list[object] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Result:
    """A request of an engine that says what it is told to; asked behind an error, it hangs."""

    def __init__(self, request: EngineRequest, guide: Guide | None) -> None:
        self.request = request
        self.guide = guide
        self.outputs = [Completion()]
        self.finished = False
        self.cached_tokens = 1
        self.aborts = 0
        self.abort_error: Exception | None = None
        self.is_told_to_end = False
        self._said: asyncio.Queue[tuple[list[int], str | None] | Exception] = asyncio.Queue()

    def say(self, *token_ids: int, end: str | None = None) -> None:
        self._said.put_nowait((list(token_ids), end))

    def fail(self, error: Exception) -> None:
        self._said.put_nowait(error)

    def abort(self) -> None:
        self.aborts += 1
        if self.abort_error is not None:
            raise self.abort_error

    def __aiter__(self) -> Result:
        return self

    async def __anext__(self) -> Result:
        if self.finished:
            raise StopAsyncIteration
        said = await self._said.get()
        if isinstance(said, Exception):
            raise said
        token_ids, end = said
        self.outputs[0].token_ids += token_ids
        if end is not None:
            self.outputs[0].finish_reason, self.finished = end, True
        return self


@dataclass
class World:
    """Lanes of a scripted engine, and all that they tell."""

    limits: LaneLimits = LIMITS
    refusal: Exception | None = None
    compiler_error: BaseException | None = None
    started: list[Result] = field(default_factory=list)
    batches: list[StepBatch] = field(default_factory=list)
    deaths: list[BaseException] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lanes = Lanes(
            cast("Requests", self),
            cast("Guides", self),
            self.limits,
            request_error=RequestError,
            dead_error=EngineDeadError,
            send=self._send,
            fatal=self.deaths.append,
        )

    def start(
        self,
        request: EngineRequest,
        room: int,
        guide: Guide | None,
    ) -> Result:
        if self.refusal is not None:
            raise self.refusal
        self.taken.append(room)
        result = Result(request, guide)
        self.started.append(result)
        return result

    def check(self, constraint: Constraint) -> Mapping[str, object]:
        if self.compiler_error is not None:
            raise self.compiler_error
        if constraint.grammar == "bad":
            raise ConstraintUnusable("the constraint does not compile")
        return {"grammar": constraint.grammar}

    def _send(self, report: Report) -> None:
        batch = StepBatch()
        unpack_step(pack_step(Counters(), report)[FRAME:], batch)
        self.batches.append(batch)

    async def settle(self) -> None:
        """Lets everything happen that can."""
        for _ in range(10):
            await asyncio.sleep(0)

    @property
    def ended(self) -> list[Ended]:
        return [ended for batch in self.batches for ended in batch.ended]

    def tokens(self, lane: Lane) -> list[int]:
        return [
            token_id
            for batch in self.batches
            for its_lane, token_id in zip(batch.lanes, batch.token_ids, strict=True)
            if its_lane == lane
        ]


async def test_a_prompt_then_tokens_then_one_end() -> None:
    world = World()
    world.lanes.submit(7, PLAIN)
    (result,) = world.started
    await world.settle()

    result.say(11)
    await world.settle()
    result.say(12, 13)
    result.say(EOS, end="stop")
    await world.settle()

    assert world.batches[0].prefilled == [Prefilled(7, 1)]
    assert world.tokens(7) == [11, 12, 13]
    assert world.ended == [Ended(7, EndReason.END_OF_SEQUENCE)]
    assert world.lanes.counts.running == world.lanes.counts.held_tokens == 0
    assert world.taken == [8]


async def test_what_several_lanes_say_in_one_turn_is_one_frame() -> None:
    world = World(limits=replace(LIMITS, capacity=8))
    for lane in range(8):
        world.lanes.submit(lane, PLAIN)
    for step in range(3):
        await world.settle()
        for result in world.started:
            result.say(100 + step)
    await world.settle()

    assert len(world.batches) == 3
    assert all(batch.lanes == list(range(8)) for batch in world.batches)


async def test_counts_follow_the_life_of_executions() -> None:
    world = World()
    world.lanes.submit(1, PLAIN)
    world.lanes.submit(2, replace(PLAIN, continue_ids=(5, 5)))
    waiting = world.lanes.counts
    world.started[1].say(11)
    await world.settle()
    running = world.lanes.counts

    assert (waiting.running, waiting.waiting, waiting.waiting_tokens) == (0, 2, 8)
    assert (running.running, running.waiting, running.waiting_tokens) == (1, 1, 3)
    assert running.held_tokens == 6


async def test_an_abort_is_passed_on_once_and_its_end_is_the_engines_last_word() -> None:
    world = World()
    world.lanes.submit(7, PLAIN)
    (result,) = world.started

    world.lanes.abort(7)
    world.lanes.abort(7)
    world.lanes.abort(8)
    result.say(11)
    await world.settle()
    before = list(world.ended)
    result.say(end="cancelled")
    await world.settle()

    assert result.aborts == 1
    assert before == []
    assert world.tokens(7) == []
    assert world.ended == [Ended(7, EndReason.ABORTED)]


async def test_an_abort_that_the_engine_cannot_take_harms_nobody() -> None:
    world = World()
    world.lanes.submit(7, PLAIN)
    (result,) = world.started
    result.abort_error = AttributeError("the executor is gone")

    world.lanes.abort(7)
    result.say(end="length")
    await world.settle()

    assert world.ended == [Ended(7, EndReason.ABORTED)]


async def test_a_stop_that_the_engine_does_not_know_is_an_end_and_makes_it_stop() -> None:
    """With ignored ends it knows no stops at all. Its lane is free, and may be used again."""
    world = World()
    request = replace(PLAIN, ignore_eos=True, stop_token_ids=frozenset({50}))
    world.lanes.submit(7, request)
    (result,) = world.started

    result.say(EOS, 11)
    result.say(50, 12)
    await world.settle()
    ended, counts = list(world.ended), world.lanes.counts
    world.lanes.submit(7, replace(PLAIN, max_output_tokens=1))
    result.say(13)
    result.say(end="cancelled")
    world.started[1].say(14, end="length")
    await world.settle()

    assert result.aborts == 1
    assert ended == [Ended(7, EndReason.STOP_TOKEN, 50)]
    assert (counts.running, counts.waiting, counts.held_tokens) == (0, 0, 0)
    assert world.tokens(7) == [EOS, 11, 14]
    assert world.ended[1:] == [Ended(7, EndReason.MAX_TOKENS)]


async def test_a_request_that_fails_ends_alone_and_is_never_asked_again() -> None:
    world = World()
    world.lanes.submit(1, PLAIN)
    world.lanes.submit(2, PLAIN)
    first, second = world.started
    first.fail(RequestError("the prompt is too long"))
    second.say(11, end="length")
    await world.settle()

    (failed,) = [ended for ended in world.ended if ended.lane == 1]
    assert failed.reason is EndReason.FAILED
    assert "too long" in failed.message
    assert world.tokens(2) == [11]
    assert not world.deaths


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), EngineDeadError("a rank is gone")])
async def test_any_other_error_is_the_end_of_the_engine(error: Exception) -> None:
    world = World()
    world.lanes.submit(1, PLAIN)
    world.started[0].fail(error)
    await world.settle()

    assert world.deaths == [error]
    assert world.ended == []


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), TypeError("x"), AssertionError("x"), IndexError("x"), RequestError("x")],
)
async def test_what_the_engine_does_not_take_fails_alone(error: Exception) -> None:
    world = World(refusal=error)
    world.lanes.submit(1, PLAIN)
    await world.settle()

    assert world.ended[0].reason is EndReason.FAILED
    assert type(error).__name__ in world.ended[0].message
    assert not world.deaths


async def test_an_engine_that_takes_nothing_more_has_died() -> None:
    error = RuntimeError("LLM is shutting down")
    world = World(refusal=error)
    world.lanes.submit(1, PLAIN)

    assert world.deaths == [error]


async def test_an_adapter_that_nobody_loaded_fails_its_execution() -> None:
    world = World(refusal=AdapterUnusable("the adapter has not been loaded"))
    world.lanes.submit(1, PLAIN)
    await world.settle()

    assert world.ended == [Ended(1, EndReason.FAILED, message="the adapter has not been loaded")]


async def test_no_room_is_an_end_without_the_engine() -> None:
    world = World()
    world.lanes.submit(1, replace(PLAIN, continue_ids=(5,) * 8))
    await world.settle()

    assert world.started == []
    assert world.batches[0].prefilled == [Prefilled(1, 0)]
    assert world.ended == [Ended(1, EndReason.MAX_TOKENS)]


async def compiled(world: World) -> None:
    """A constraint is compiled in a thread."""
    async with asyncio.timeout(5):
        while not world.started and not world.ended:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.001)


async def test_a_constraint_is_compiled_before_the_engine_gets_it() -> None:
    world = World()
    world.lanes.submit(1, replace(PLAIN, constraint=REGEX))
    at_first = list(world.started)
    await compiled(world)

    assert at_first == []
    assert world.started[0].guide == {"grammar": "start: /a/"}
    assert world.taken == [9]


async def test_a_constraint_that_does_not_compile_fails_alone() -> None:
    world = World()
    world.lanes.submit(1, replace(PLAIN, constraint=replace(REGEX, grammar="bad")))
    await compiled(world)
    await world.settle()

    assert world.started == []
    assert world.ended == [Ended(1, EndReason.FAILED, message="the constraint does not compile")]


async def test_an_execution_that_is_aborted_while_it_compiles_never_starts() -> None:
    world = World()
    world.lanes.submit(1, replace(PLAIN, constraint=REGEX))
    world.lanes.abort(1)
    world.lanes.submit(1, replace(PLAIN, max_output_tokens=3))
    await compiled(world)
    await asyncio.sleep(0.05)

    assert world.ended == [Ended(1, EndReason.ABORTED)]
    assert [result.guide for result in world.started] == [None]


async def test_errors_about_constrained_executions_keep_their_words_to_themselves() -> None:
    world = World()
    world.lanes.submit(1, replace(PLAIN, constraint=REGEX))
    await compiled(world)
    world.started[0].fail(RequestError("the grammar secret does not compile"))
    await world.settle()

    assert "secret" not in world.ended[0].message


async def test_an_output_under_a_constraint_that_was_begun_elsewhere_is_refused() -> None:
    world = World()
    world.lanes.submit(1, replace(PLAIN, constraint=REGEX, continue_ids=(5,)))
    await world.settle()

    assert world.started == []
    assert [(ended.lane, ended.reason) for ended in world.ended] == [(1, EndReason.FAILED)]
    assert "begin it anew" in world.ended[0].message
    assert world.lanes.counts.waiting_tokens == 0


def background(tokens: int = 8) -> EngineRequest:
    return replace(PLAIN, is_background=True, max_output_tokens=tokens)


async def test_background_waits_until_nothing_else_does() -> None:
    world = World()
    world.lanes.submit(1, PLAIN)
    world.lanes.submit(2, background())
    at_first = len(world.started)
    world.started[0].say(11)
    await world.settle()
    when_begun = len(world.started)
    world.lanes.submit(3, background())
    when_full = len(world.started)
    world.started[0].say(12, end="length")
    world.started[1].say(21)
    await world.settle()

    assert (at_first, when_begun, when_full, len(world.started)) == (1, 2, 2, 3)
    assert world.lanes.counts.waiting == 1


async def test_background_that_is_aborted_before_it_starts_leaves_no_trace() -> None:
    world = World()
    world.lanes.submit(1, PLAIN)
    world.lanes.submit(2, background())
    world.lanes.abort(2)
    world.lanes.submit(2, replace(background(), max_output_tokens=1))
    world.started[0].say(11)
    await world.settle()

    assert world.ended == [Ended(2, EndReason.ABORTED)]
    assert world.taken == [8, 1]


async def test_in_a_crowd_tokens_wait_for_later_ones_but_first_tokens_and_ends_do_not() -> None:
    crowd = replace(LIMITS, capacity=40, interval_under_load=3)
    world = World(limits=crowd)
    for lane in range(40):
        world.lanes.submit(lane, PLAIN)
    for step in range(7):
        await world.settle()
        for result in world.started:
            result.say(100 + step)
    await world.settle()
    sizes = [len(batch.lanes) for batch in world.batches]
    world.started[0].say(end="length")
    await world.settle()

    # The first tokens at once, then three steps together, and what ends takes the rest along.
    assert sizes == [40, 120, 120]
    assert [len(batch.lanes) for batch in world.batches][3:] == [0]


async def test_tokens_in_a_crowd_do_not_wait_for_an_engine_that_says_nothing() -> None:
    world = World(limits=replace(LIMITS, capacity=40, interval_under_load=50))
    for lane in range(40):
        world.lanes.submit(lane, PLAIN)
    for token_id in (11, 12):
        for result in world.started:
            result.say(token_id)
        await world.settle()
    before = len(world.batches)
    async with asyncio.timeout(5):
        while len(world.batches) == before:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)

    assert before == 1
    assert world.tokens(3) == [11, 12]


async def test_scores_stand_beside_their_rows() -> None:
    world = World()
    world.lanes.submit(1, PLAIN)
    world.lanes.submit(2, replace(PLAIN, top_logprobs=1))
    plain, scored = world.started
    for token_id in (11, 12):
        # One more than there are tokens, for a moment.
        scored.outputs[0].logprobs = [{11: -1.0}, {12: -2.0, 9: -0.5}]
        plain.say(10)
        scored.say(token_id)
        await world.settle()

    first, second = (batch.scores for batch in world.batches)
    assert first is not None
    assert second is not None
    assert first.logprobs[1] == -1.0
    assert second.logprobs[1] == -2.0
    assert second.top_token_ids == [-1, 9]


async def test_many_in_the_background_may_be_refused_one_after_the_other() -> None:
    world = World()
    world.lanes.submit(1, PLAIN)
    for lane in range(2, 602):
        world.lanes.submit(lane, background())
    world.refusal = ValueError("too long")
    world.started[0].say(EOS, end="stop")
    await world.settle()

    assert world.deaths == []
    assert sorted(ended.lane for ended in world.ended) == list(range(1, 602))
    assert sum(ended.reason is EndReason.FAILED for ended in world.ended) == 600


class PanicError(BaseException):
    """As libraries in Rust raise them."""


@pytest.mark.parametrize("kind", [RecursionError, PanicError])
async def test_a_constraint_that_breaks_its_compiler_fails_alone(kind: type[BaseException]) -> None:
    world = World()
    world.compiler_error = kind("of secret")
    world.lanes.submit(1, replace(PLAIN, constraint=REGEX))
    await compiled(world)
    await world.settle()

    assert [ended.reason for ended in world.ended] == [EndReason.FAILED]
    assert "secret" not in world.ended[0].message
    assert world.deaths == []
