from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from maas.engine.v1 import engine_pb2

from libs.errors import ResourceExhausted, Unavailable
from services.worker import outbox as module
from services.worker.outbox import LANES_MAX, Outbox

rows = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 99), st.text("ab", max_size=2)))


def fill(outbox: Outbox, *added: tuple[int, int, str]) -> None:
    for lane, token_id, text in added:
        outbox.lanes.append(lane)
        outbox.token_ids.append(token_id)
        outbox.texts.append(text)


def unpack(events: engine_pb2.StepEvents) -> dict[int, tuple[list[int], str]]:
    counts = list(events.token_counts) or [1] * len(events.lanes)
    assert len(set(events.lanes)) == len(events.lanes)
    found: dict[int, tuple[list[int], str]] = {}
    place = 0
    for lane, count, text in zip(events.lanes, counts, events.texts, strict=True):
        found[lane] = (list(events.token_ids[place : place + count]), text)
        place += count
    assert place == len(events.token_ids)
    return found


@settings(deadline=None)
@given(added=rows)
async def test_a_message_has_one_row_for_each_lane_with_all_its_tokens(
    added: list[tuple[int, int, str]],
) -> None:
    outbox = Outbox()
    outbox.grant(1)
    fill(outbox, *added)
    outbox.accept(9, 1)

    events = (await outbox.next()).events

    want: dict[int, tuple[list[int], str]] = {}
    for lane, token_id, text in added:
        token_ids, before = want.get(lane, ([], ""))
        want[lane] = ([*token_ids, token_id], before + text)
    assert unpack(events) == want
    assert bool(events.token_counts) == (len(want) < len(added))


async def test_nothing_is_sent_without_credit() -> None:
    outbox = Outbox()
    fill(outbox, (1, 5, "a"))
    waiting = asyncio.ensure_future(outbox.next())
    outbox.wake()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not waiting.done()

    outbox.grant(1)

    assert unpack((await waiting).events) == {1: ([5], "a")}


async def test_a_lane_is_in_use_until_its_end_is_sent() -> None:
    outbox = Outbox()
    assert outbox.open_lane(1)
    outbox.end(engine_pb2.Ended(lane=1))
    assert not outbox.open_lane(1)

    outbox.grant(1)
    await outbox.next()

    assert outbox.open_lane(1)


async def test_who_starts_without_reading_is_cut_off() -> None:
    outbox = Outbox()
    for lane in range(LANES_MAX):
        assert outbox.open_lane(lane)

    with pytest.raises(ResourceExhausted):
        outbox.open_lane(LANES_MAX)


async def test_ends_wait_behind_rows_that_did_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_MAX", 3)
    outbox = Outbox()
    outbox.open_lane(1)
    outbox.accept(1, 7)
    fill(outbox, *((1, token_id, "x") for token_id in range(5)))
    outbox.end(engine_pb2.Ended(lane=1))
    outbox.grant(2)

    first = (await outbox.next()).events
    second = (await outbox.next()).events

    assert (unpack(first), len(first.accepted), len(first.ended)) == ({1: ([0, 1, 2], "xxx")}, 1, 0)
    assert (unpack(second), len(second.ended)) == ({1: ([3, 4], "xx")}, 1)


async def test_a_closed_stream_tells_all_ends_first() -> None:
    outbox = Outbox()
    outbox.open_lane(1)
    outbox.grant(9)
    outbox.close(Unavailable("over"))
    waiting = asyncio.ensure_future(outbox.next())
    await asyncio.sleep(0)
    assert not waiting.done()

    outbox.end(engine_pb2.Ended(lane=1))
    outbox.wake()

    assert len((await waiting).events.ended) == 1
    with pytest.raises(Unavailable):
        await outbox.next()
