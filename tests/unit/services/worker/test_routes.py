"""services/worker/routes.py: which rows can be handed on as columns."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from libs.testing import FakeClock
from services.worker.routes import Route, Routes
from services.worker.runs import Place, Run, Stream


def make_run(stream: Stream, lane: int, *, is_matching: bool = False) -> Run:
    run = Run(Place(f"execution-{lane}"), stream, lane, 0.0)
    run.is_matching = is_matching
    return run


@given(
    kinds=st.lists(st.sampled_from(["first", "second", "matching", "gone"]), max_size=12),
    repeats=st.lists(st.integers(0, 11), max_size=20),
)
async def test_every_row_goes_where_its_execution_listens(
    kinds: list[str], repeats: list[int]
) -> None:
    """With several streams, several rows of a lane, and rows of those who are over."""
    async with asyncio.TaskGroup() as tasks:
        streams = {name: Stream(tasks, FakeClock()) for name in ("first", "second", "matching")}
        running = {
            place: make_run(streams[kind], 100 + place, is_matching=kind == "matching")
            for place, kind in enumerate(kinds)
            if kind != "gone"
        }
        lanes = [place for place in repeats if place < len(kinds)]
        token_ids = [1000 + row for row in range(len(lanes))]

        route = Route(lanes, running)

        got: dict[str, list[tuple[int, int]]] = {}
        for group in route.groups:
            (name,) = (name for name, stream in streams.items() if stream.outbox is group.outbox)
            picked = group.pick(token_ids)
            got[name] = list(zip(group.lanes, picked, strict=True))
            assert [lane + 100 for lane in group.pick(lanes)] == group.lanes
        for row, run in route.matching:
            got.setdefault("matching", []).append((run.lane, token_ids[row]))
        want: dict[str, list[tuple[int, int]]] = {}
        for lane, token_id in zip(lanes, token_ids, strict=True):
            if kinds[lane] != "gone":
                want.setdefault(kinds[lane], []).append((lane + 100, token_id))
        assert got == want


async def test_a_route_is_for_lanes_that_come_again_until_somebody_leaves() -> None:
    async with asyncio.TaskGroup() as tasks:
        stream = Stream(tasks, FakeClock())
        running = {lane: make_run(stream, lane) for lane in (1, 2)}
        routes = Routes()
        assert routes.find([1, 2], running) is None
        route = routes.find([1, 2], running)
        assert route is not None
        assert routes.find([1, 2], running) is route
        assert routes.find([1], running) is None, "other lanes"
        assert routes.find([1, 2], running) is None

        routes.find([1, 2], running)
        routes.leave(running.pop(2))
        after = routes.find([1, 2], running)

        assert after is not None
        assert after.groups[0].lanes == [1], "who has left hears nothing more"


async def test_there_is_no_route_while_an_execution_holds_text() -> None:
    async with asyncio.TaskGroup() as tasks:
        run = make_run(Stream(tasks, FakeClock()), 1)
        routes = Routes()
        routes.find([1], {1: run})
        routes.holding.add(run)
        assert routes.find([1], {1: run}) is None

        routes.holding.discard(run)

        assert routes.find([1], {1: run}) is not None
