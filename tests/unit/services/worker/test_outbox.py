from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from maas.engine.v1 import engine_pb2, engine_service_pb2

from libs.errors import Cancelled, MaasError, ResourceExhausted, Unavailable
from libs.testing import FakeClock
from services.worker import outbox as module
from services.worker.outbox import HALT_S, HELD_MAX, LANES_MAX, Outbox
from services.worker.rows import ROW_TOKENS_MAX

rows = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 99), st.text("ab", max_size=2)), min_size=1
)
INTERVAL_S = 0.08
EPSILON_S = 0.001


class Transport:
    """A call's context, which takes messages when it is open.

    Attributes:
        messages: that it was given.
        error: what a write ends with, once there is one.
    """

    def __init__(self) -> None:
        self.messages: list[engine_pb2.StepEvents] = []
        self.error: Exception | None = None
        self._is_open = asyncio.Event()
        self._is_open.set()

    def block(self) -> None:
        """Takes nothing more, as a gateway that does not read."""
        self._is_open.clear()

    def unblock(self) -> None:
        self._is_open.set()

    async def write(self, response: engine_service_pb2.ExecuteManyResponse) -> None:
        events = engine_pb2.StepEvents()
        events.CopyFrom(response.events)
        self.messages.append(events)
        await self._is_open.wait()
        if self.error is not None:
            raise self.error


class World:
    """An outbox that writes to a transport."""

    def __init__(self, *, grant: int = 1000) -> None:
        self.clock = FakeClock()
        self.transport = Transport()
        self.outbox = Outbox(self.clock)
        self.outbox.attach(self.transport.write)
        self.outbox.grant(grant)

    async def accept(self, lane: int, interval_s: float = 0.0) -> None:
        """Accepts an execution and sends its first token."""
        self.outbox.open_lane(lane)
        self.outbox.accept(lane, 1, interval_s)
        self.outbox.wake()
        await turns()
        self.fill((lane, 0, "first"))
        self.outbox.urge()
        self.outbox.wake()
        await turns()

    async def step(self, *added: tuple[int, int, str]) -> None:
        """Appends what one step of the engine gave."""
        self.fill(*added)
        self.outbox.wake()
        await turns()

    def fill(self, *added: tuple[int, int, str]) -> None:
        for lane, token_id, text in added:
            self.outbox.lanes.append(lane)
            self.outbox.token_ids.append(token_id)
            self.outbox.texts.append(text)

    async def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        await turns()

    def take(self) -> list[engine_pb2.StepEvents]:
        """Returns the messages since the last time."""
        messages, self.transport.messages = self.transport.messages, []
        return messages


async def turns() -> None:
    """Lets everything that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


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
    world = World()
    world.outbox.accept(9, 1)

    await world.step(*added)

    (events,) = world.take()
    want: dict[int, tuple[list[int], str]] = {}
    for lane, token_id, text in added:
        token_ids, before = want.get(lane, ([], ""))
        want[lane] = ([*token_ids, token_id], before + text)
    assert unpack(events) == want
    assert bool(events.token_counts) == (len(want) < len(added))
    assert [accepted.lane for accepted in events.accepted] == [9]


async def test_nothing_is_sent_without_credit() -> None:
    world = World(grant=0)
    await world.step((1, 5, "a"))
    assert world.take() == []

    world.outbox.grant(1)
    await turns()

    assert [unpack(events) for events in world.take()] == [{1: ([5], "a")}]


async def test_a_step_is_written_before_anybody_else_gets_a_turn() -> None:
    world = World()
    world.fill((1, 5, "a"))

    world.outbox.wake()

    assert len(world.take()) == 1


async def test_while_the_transport_is_busy_steps_are_merged() -> None:
    world = World()
    world.transport.block()
    for token_id in (5, 6, 7):
        await world.step((1, token_id, "x"))
    assert [unpack(events) for events in world.take()] == [{1: ([5], "x")}]

    world.transport.unblock()
    await turns()

    assert [unpack(events) for events in world.take()] == [{1: ([6, 7], "xx")}]


async def test_what_comes_in_one_turn_shares_a_message() -> None:
    world = World()
    world.outbox.accept(1, 4)
    world.outbox.wake_soon()
    world.outbox.accept(2, 4)
    world.outbox.wake_soon()
    world.fill((1, 5, "a"))
    world.outbox.wake()
    await turns()

    (events,) = world.take()

    assert (len(events.accepted), unpack(events)) == (2, {1: ([5], "a")})


async def test_a_lane_is_in_use_until_its_end_is_sent() -> None:
    world = World(grant=0)
    assert world.outbox.open_lane(1)
    world.outbox.end(engine_pb2.Ended(lane=1))
    assert not world.outbox.open_lane(1)

    world.outbox.grant(1)

    assert world.outbox.open_lane(1)


async def test_who_starts_without_reading_is_cut_off() -> None:
    outbox = Outbox(FakeClock())
    for lane in range(LANES_MAX):
        assert outbox.open_lane(lane)

    with pytest.raises(ResourceExhausted):
        outbox.open_lane(LANES_MAX)


async def test_ends_wait_behind_rows_that_did_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_MAX", 3)
    world = World()
    world.outbox.open_lane(1)
    world.outbox.accept(1, 7, INTERVAL_S)
    world.outbox.end(engine_pb2.Ended(lane=1))

    await world.step(*((1, token_id, "x") for token_id in range(5)))

    first, second = world.take()
    assert (unpack(first), len(first.accepted), len(first.ended)) == ({1: ([0, 1, 2], "xxx")}, 1, 0)
    assert (unpack(second), len(second.ended)) == ({1: ([3, 4], "xx")}, 1)


@settings(deadline=None)
@given(added=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 99)), min_size=1, max_size=400))
async def test_what_piled_up_during_a_halt_comes_in_order_in_rows_of_bounded_length(
    added: list[tuple[int, int]],
) -> None:
    world = World(grant=0)
    for lane in (1, 2, 3):
        world.outbox.open_lane(lane)
    await world.advance(HALT_S + EPSILON_S)
    await world.step(*((lane, token_id, str(token_id)) for lane, token_id in added))
    for lane in (1, 2, 3):
        world.outbox.end(engine_pb2.Ended(lane=lane))

    world.outbox.grant(1000)
    await turns()
    while world.outbox.lanes:
        await turns()

    messages = world.take()
    told: dict[int, list[int]] = {}
    for events in messages:
        for lane, (token_ids, text) in unpack(events).items():
            assert len(token_ids) <= ROW_TOKENS_MAX
            assert text == "".join(str(token_id) for token_id in token_ids)
            told.setdefault(lane, []).extend(token_ids)
    want: dict[int, list[int]] = {}
    for lane, token_id in added:
        want.setdefault(lane, []).append(token_id)
    assert told == want
    assert [len(events.ended) for events in messages] == [0] * (len(messages) - 1) + [3]


async def test_without_a_halt_a_row_is_as_long_as_it_is() -> None:
    world = World()
    await world.accept(1)
    world.take()
    await world.advance(HALT_S + EPSILON_S)
    await world.step(*((1, 5, "a") for _ in range(ROW_TOKENS_MAX + 1)))
    assert [list(events.token_counts) for events in world.take()] == [[ROW_TOKENS_MAX], []]

    for _ in range(3):
        await world.advance(HALT_S / 2)
        await world.step((1, 5, "a"))
    world.take()
    await world.step(*((1, 5, "a") for _ in range(ROW_TOKENS_MAX + 1)))

    assert [list(events.token_counts) for events in world.take()] == [[ROW_TOKENS_MAX + 1]]


async def test_what_the_engine_made_during_a_halt_may_come_behind_a_message() -> None:
    """The timer of an interval goes off before the pipe of the engine is read."""
    world = World()
    await world.accept(1, INTERVAL_S)
    await world.step((1, 0, "a"))
    world.take()

    await world.advance(10 * HALT_S)
    assert [list(events.token_ids) for events in world.take()] == [[0]]
    await world.advance(HALT_S / 10)
    await world.step(*((1, token_id, "b") for token_id in range(3 * ROW_TOKENS_MAX)))
    world.outbox.urge()
    world.outbox.wake()
    await turns()

    messages = world.take()
    assert [list(events.token_counts) for events in messages] == 3 * [[ROW_TOKENS_MAX]]
    assert [token_id for events in messages for token_id in events.token_ids] == list(
        range(3 * ROW_TOKENS_MAX)
    )


async def test_rows_that_did_not_fit_follow_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_MAX", 3)
    monkeypatch.setattr(module, "HELD_MAX", 3)
    world = World()
    await world.accept(1, INTERVAL_S)
    world.take()

    await world.step(*((1, token_id, "x") for token_id in range(5)))

    assert [list(events.token_ids) for events in world.take()] == [[0, 1, 2], [3, 4]]


async def test_a_closed_stream_tells_all_ends_first() -> None:
    world = World()
    world.outbox.open_lane(1)
    world.outbox.close(Unavailable("over"))
    over = asyncio.ensure_future(world.outbox.wait_over())
    await turns()
    assert not over.done()
    world.transport.block()
    world.outbox.end(engine_pb2.Ended(lane=1))
    world.outbox.wake()
    await turns()
    assert not over.done(), "the last message is on its way"

    world.transport.unblock()

    with pytest.raises(Unavailable):
        await over
    assert [len(events.ended) for events in world.take()] == [1]


async def test_a_stream_that_was_closed_before_it_could_write_ends() -> None:
    outbox = Outbox(FakeClock())
    outbox.close(Unavailable("over"))

    outbox.attach(Transport().write)

    with pytest.raises(Unavailable):
        await outbox.wait_over()


@pytest.mark.parametrize("error", [RuntimeError("gone"), asyncio.InvalidStateError("gone")])
async def test_a_write_that_fails_ends_the_stream(error: Exception) -> None:
    world = World()
    world.transport.error = error
    await world.step((1, 5, "a"))

    with pytest.raises(Cancelled):
        await world.outbox.wait_over()

    await world.step((1, 6, "b"))
    assert len(world.take()) == 1


async def test_tokens_wait_for_half_of_the_shortest_interval_and_share_a_message() -> None:
    world = World()
    await world.accept(1, 4 * INTERVAL_S)
    await world.accept(2, INTERVAL_S)
    world.take()

    await world.step((1, 5, "a"), (2, 6, "b"))
    await world.advance(0.02)
    await world.step((1, 7, "c"), (2, 8, "d"))
    await world.advance(0.02 - EPSILON_S)
    assert world.take() == []
    await world.advance(EPSILON_S)

    assert [unpack(events) for events in world.take()] == [{1: ([5, 7], "ac"), 2: ([6, 8], "bd")}]


async def test_each_message_has_the_interval_of_its_own_oldest_token() -> None:
    world = World()
    await world.accept(1, INTERVAL_S)
    world.take()
    await world.step((1, 5, "a"))
    await world.advance(INTERVAL_S / 2)
    assert len(world.take()) == 1
    await world.advance(INTERVAL_S / 4)

    await world.step((1, 6, "b"))
    await world.advance(INTERVAL_S / 2 - EPSILON_S)
    assert world.take() == []
    await world.advance(EPSILON_S)

    assert [unpack(events) for events in world.take()] == [{1: ([6], "b")}]


async def test_what_left_early_takes_its_timer_along() -> None:
    world = World()
    await world.accept(1, INTERVAL_S)
    await world.step((1, 5, "a"))
    await world.advance(INTERVAL_S / 4)
    await world.accept(2, INTERVAL_S)
    world.take()

    await world.step((1, 6, "b"))
    await world.advance(INTERVAL_S / 2 - EPSILON_S)
    assert world.take() == []
    await world.advance(EPSILON_S)

    assert [unpack(events) for events in world.take()] == [{1: ([6], "b")}]


async def test_the_acceptance_and_the_first_token_take_along_what_waits() -> None:
    world = World()
    await world.accept(1, INTERVAL_S)
    world.take()
    await world.step((1, 5, "a"))

    await world.accept(2, INTERVAL_S)

    accepted, first = world.take()
    assert [item.lane for item in accepted.accepted] == [2]
    assert unpack(accepted) == {1: ([5], "a")}
    assert unpack(first) == {2: ([0], "first")}


async def test_an_end_takes_along_what_waits() -> None:
    world = World()
    await world.accept(1, INTERVAL_S)
    await world.accept(2, INTERVAL_S)
    world.take()
    world.fill((1, 5, "a"), (2, 6, "b"))
    world.outbox.end(engine_pb2.Ended(lane=1))

    world.outbox.wake()

    (events,) = world.take()
    assert unpack(events) == {1: ([5], "a"), 2: ([6], "b")}
    assert [ended.lane for ended in events.ended] == [1]
    await world.step((2, 7, "c"))
    assert world.take() == [], "the other one may still wait"


async def test_one_execution_without_an_interval_makes_all_of_the_stream_prompt() -> None:
    world = World()
    await world.accept(1, INTERVAL_S)
    await world.step((1, 5, "a"))
    await world.accept(2)
    world.take()

    await world.step((1, 6, "b"))
    assert len(world.take()) == 1
    world.outbox.end(engine_pb2.Ended(lane=2))
    world.outbox.wake()
    await turns()
    world.take()
    await world.step((1, 7, "c"))

    assert world.take() == []


async def test_while_one_has_been_refused_others_may_wait() -> None:
    world = World()
    await world.accept(1, INTERVAL_S)
    world.outbox.open_lane(2)
    world.outbox.end(engine_pb2.Ended(lane=2))
    world.outbox.wake()
    await turns()
    world.take()

    await world.step((1, 5, "a"))

    assert world.take() == []


async def test_what_may_wait_is_bounded() -> None:
    world = World()
    await world.accept(1, INTERVAL_S)
    world.take()

    await world.step(*((1, 5, "a") for _ in range(HELD_MAX - 1)))
    assert world.take() == []
    await world.step((1, 5, "a"))

    (events,) = world.take()
    assert list(events.token_counts) == [HELD_MAX]


async def test_credit_does_not_send_what_may_wait() -> None:
    world = World(grant=2)
    await world.accept(1, INTERVAL_S)
    assert len(world.take()) == 2
    await world.step((1, 5, "a"))

    world.outbox.grant(5)
    assert world.take() == []
    await world.advance(INTERVAL_S / 2)

    assert len(world.take()) == 1


async def test_what_was_due_without_credit_leaves_with_the_credit() -> None:
    world = World(grant=2)
    await world.accept(1, INTERVAL_S)
    world.take()
    await world.step((1, 5, "a"))
    await world.advance(INTERVAL_S)
    await world.step((1, 6, "b"))
    assert world.take() == []

    world.outbox.grant(5)

    assert [unpack(events) for events in world.take()] == [{1: ([5, 6], "ab")}]


async def test_a_stream_that_is_over_has_no_timer_and_writes_nothing() -> None:
    world = World()
    await world.accept(1, INTERVAL_S)
    world.take()
    await world.step((1, 5, "a"))

    world.outbox.detach()
    await world.advance(INTERVAL_S)

    assert world.take() == []
    assert world.clock.pending == 0


class Model:
    """What a gateway has to be told, and by when."""

    def __init__(self) -> None:
        self.world = World(grant=0)
        self.credit = 0
        # By open lane: its interval; and what its executions said that nobody was told.
        self.open: dict[int, float] = {}
        self.said: dict[int, list[int]] = {}
        # Acceptances and ends that nobody was told.
        self.untold: list[tuple[str, int]] = []
        self.drawn = 0
        self.oldest_s: float | None = None

    async def play(self, what: str, count: int, value: float) -> None:
        """Lets something happen, and checks what the gateway is told then."""
        outbox = self.world.outbox
        if what == "accept" and outbox.open_lane(count):
            outbox.accept(count, 1, value)
            self.open[count] = value
            self.untold.append(("accepted", count))
        elif what == "end" and self.open.pop(count, None) is not None:
            outbox.end(engine_pb2.Ended(lane=count))
            self.untold.append(("ended", count))
        elif what == "grant":
            outbox.grant(count)
            self.credit += count
        elif what == "step":
            await self.world.advance(value)
            self.hear()
            self.draw()
        outbox.wake()
        await turns()
        self.hear()
        self.check()

    def draw(self) -> None:
        for lane in self.open:
            self.drawn += 1
            self.world.fill((lane, self.drawn, "x"))
            self.said.setdefault(lane, []).append(self.drawn)
            if self.oldest_s is None:
                self.oldest_s = self.world.clock.monotonic_s()

    def hear(self) -> None:
        for events in self.world.take():
            self.credit -= 1
            for item in events.accepted:
                self.untold.remove(("accepted", item.lane))
            for lane, (token_ids, _) in unpack(events).items():
                assert token_ids == self.said.pop(lane), "all of them, in order"
                assert ("accepted", lane) not in self.untold
            for ended in events.ended:
                self.untold.remove(("ended", ended.lane))
            assert not self.said, "a message takes everything"
            self.oldest_s = None

    def check(self) -> None:
        assert self.credit >= 0
        if not self.credit:
            return
        assert not self.untold
        if self.oldest_s is not None:
            waited_s = self.world.clock.monotonic_s() - self.oldest_s
            assert waited_s < min(self.open.values()) / 2


@settings(deadline=None)
@given(
    script=st.lists(
        st.one_of(
            st.tuples(st.just("accept"), st.integers(1, 4), st.sampled_from([0.0, 0.04, 0.08])),
            st.tuples(st.just("step"), st.just(0), st.sampled_from([0.004, 0.011, 0.03])),
            st.tuples(st.just("end"), st.integers(1, 4), st.just(0.0)),
            st.tuples(st.just("grant"), st.integers(1, 8), st.just(0.0)),
        ),
        max_size=60,
    )
)
async def test_whatever_happens_all_is_told_once_in_order_and_in_time(
    script: list[tuple[str, int, float]],
) -> None:
    model = Model()
    for what, count, value in script:
        await model.play(what, count, value)

    await model.play("grant", 2, 0)
    await model.world.advance(1)
    model.hear()

    assert (model.said, model.untold) == ({}, [])


async def test_a_closed_stream_has_the_error_that_it_was_closed_with() -> None:
    world = World()
    error: MaasError = Unavailable("drained")
    world.outbox.close(error)

    with pytest.raises(Unavailable) as raised:
        await world.outbox.wait_over()

    assert raised.value is error
