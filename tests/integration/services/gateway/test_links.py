"""Links to workers over real gRPC, against a worker that does what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from maas.engine.v1 import engine_pb2

from libs.errors import FieldRule, InvalidArgument, Reason, Unavailable, Violation
from libs.process import Background
from services.gateway import links
from services.gateway.generation import new_sink
from services.gateway.links import WINDOW, Link, LinkPool
from services.gateway.rich import RichSink, RichTerms
from tests.integration.services.gateway.harness import END, TOKEN, ScriptedWorker, served, taken


@asynccontextmanager
async def linked(worker: ScriptedWorker) -> AsyncIterator[Link]:
    async with served(worker) as endpoint, Background() as background:
        link = LinkPool(TOKEN, background).get("workers/w1", endpoint)
        await link.ready(5)
        yield link


def execution(name: str) -> engine_pb2.Execution:
    return engine_pb2.Execution(execution_id=name, model_version="models/m/versions/1", text="x")


async def test_columns_reach_the_sink_of_their_lane() -> None:
    worker = ScriptedWorker()
    async with linked(worker) as link:
        first, second = new_sink(), new_sink()
        lanes = [link.start(execution("a"), first), link.start(execution("b"), second)]
        worker.responses.put_nowait(
            engine_pb2.StepEvents(
                accepted=[
                    engine_pb2.Accepted(lane=lanes[0], input_tokens=3),
                    engine_pb2.Accepted(lane=lanes[1], input_tokens=5),
                ],
                lanes=lanes,
                token_counts=[2, 1],
                token_ids=[10, 11, 20],
                texts=["ab", "c"],
            )
        )
        worker.responses.put_nowait(
            engine_pb2.StepEvents(
                lanes=[lanes[1]],
                token_ids=[21],
                texts=["d"],
                ended=[engine_pb2.Ended(lane=lanes[1], end=END)],
            )
        )

        assert (await first.accepted, await second.accepted) == (3, 5)
        chunk = await taken(first)
        assert (chunk.text, chunk.token_ids) == ("ab", [10, 11])
        text = ""
        ids: list[int] = []
        while True:
            chunk = await taken(second)
            text, ids = text + chunk.text, ids + chunk.token_ids
            if chunk.end is not None:
                break
        assert (text, ids, chunk.end) == ("cd", [20, 21], END)
        assert link.running == 1


async def test_starts_and_aborts_reach_the_worker() -> None:
    worker = ScriptedWorker()
    async with linked(worker) as link:
        sink = new_sink()
        lane = link.start(execution("a"), sink)
        request = await worker.requests.get()
        link.abort(lane, sink)
        link.abort(lane, new_sink())

        assert [(start.execution_id, start.lane) for start in request.start] == [("a", lane)]
        assert list(request.abort_lanes) == []
        assert list((await worker.requests.get()).abort_lanes) == [lane]


async def test_what_was_not_sent_yet_is_taken_back() -> None:
    """A worker reads aborts before starts: in one message with its start an abort is lost."""
    worker = ScriptedWorker()
    async with linked(worker) as link:
        kept = RichSink(RichTerms(count=2, with_ids=False, with_reasoning=True))
        dropped = RichSink(kept.terms)
        first = link.start_many(execution("a"), kept.inlets)
        second = link.start_many(execution("b"), dropped.inlets)
        for lane, inlet in zip(second, dropped.inlets, strict=True):
            link.abort(lane, inlet)
        assert link.running == 2
        third = link.start(execution("c"), new_sink())

        request = await worker.requests.get()

        assert [start.execution_id for start in request.start] == ["a", "c"]
        assert list(request.abort_lanes) == []
        assert third == second[0]
        assert not set(first) & set(second)


async def test_long_prompts_that_come_together_are_not_one_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One message above what a worker reads would end everybody's work on it."""
    monkeypatch.setattr(links, "START_BYTES_MAX", 2_000_000)
    worker = ScriptedWorker()
    async with linked(worker) as link:
        for name, size in (("a", 10), ("b", 1_500_000), ("c", 3_000_000), ("d", 10), ("e", 10)):
            start = execution(name)
            start.text = "x" * size
            link.start(start, new_sink())
        sent: list[list[str]] = []
        while sum(map(len, sent)) < 5:
            async with asyncio.timeout(5):
                request = await worker.requests.get()
            sent.append([start.execution_id for start in request.start])

        assert sent == [["a", "b"], ["c"], ["d", "e"]]
        assert (link.is_up, worker.streams) == (True, 1)


async def test_a_failure_becomes_its_error() -> None:
    worker = ScriptedWorker()
    async with linked(worker) as link:
        sink = new_sink()
        lane = link.start(execution("a"), sink)
        failure = engine_pb2.Failure(
            code=3,
            reason="CONTEXT_LENGTH_EXCEEDED",
            message="too long",
            metadata={"tokens": "9", "limit": "8"},
            violations=[
                engine_pb2.FailureViolation(
                    field="spec.text", rule="TOO_LONG", description="has 9 tokens"
                ),
                engine_pb2.FailureViolation(field="spec.stop", rule="FROM_LATER"),
            ],
        )
        worker.responses.put_nowait(
            engine_pb2.StepEvents(ended=[engine_pb2.Ended(lane=lane, failure=failure)])
        )

        with pytest.raises(InvalidArgument) as caught:
            await sink.accepted
        assert caught.value.reason is Reason.CONTEXT_LENGTH_EXCEEDED
        assert caught.value.metadata == {"tokens": "9", "limit": "8"}
        assert caught.value.violations == (
            Violation("spec.text", FieldRule.TOO_LONG, "has 9 tokens"),
        )


async def test_a_broken_stream_fails_everything_on_it_and_comes_back() -> None:
    worker = ScriptedWorker()
    async with linked(worker) as link:
        sink = new_sink()
        link.start(execution("a"), sink)
        await worker.requests.get()

        worker.responses.put_nowait(None)

        with pytest.raises(Unavailable) as caught:
            await taken(sink)
        assert caught.value.reason is Reason.WORKER_LOST
        assert caught.value.metadata == {"worker": "workers/w1"}
        await link.ready(5)
        again = new_sink()
        link.start(execution("b"), again)
        assert (await worker.requests.get()).start[0].execution_id == "b"
        assert worker.streams == 2
        assert link.running == 1


async def test_nonsense_from_a_worker_costs_that_worker_only() -> None:
    worker = ScriptedWorker()
    async with linked(worker) as link:
        sink = new_sink()
        link.start(execution("a"), sink)

        worker.responses.put_nowait(engine_pb2.StepEvents(lanes=[4711], token_ids=[1], texts=["x"]))

        with pytest.raises(Unavailable):
            await taken(sink)
        await link.ready(5)


async def test_credit_is_granted_as_messages_are_read() -> None:
    worker = ScriptedWorker()
    async with linked(worker) as link:
        sink = new_sink()
        lane = link.start(execution("a"), sink)
        await worker.requests.get()
        for number in range(WINDOW):
            worker.responses.put_nowait(
                engine_pb2.StepEvents(lanes=[lane], token_ids=[number], texts=["x"])
            )
        received: list[int] = []
        while len(received) < WINDOW:
            received += (await taken(sink)).token_ids
        async with asyncio.timeout(5):
            while worker.granted < WINDOW + WINDOW // 2:
                await worker.grants.get()

        assert received == list(range(WINDOW))
        assert worker.granted <= 2 * WINDOW


async def test_a_worker_that_is_not_there_is_lost_in_bounded_time() -> None:
    async with Background() as background:
        link = LinkPool(TOKEN, background).get("workers/w1", "127.0.0.1:1")

        with pytest.raises(Unavailable) as caught:
            await link.ready(0.3)
        with pytest.raises(Unavailable):
            link.start(execution("a"), new_sink())
        assert caught.value.reason is Reason.WORKER_LOST
