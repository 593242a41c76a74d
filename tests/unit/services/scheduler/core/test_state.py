"""The recount finds what is wrong: each index is broken once by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from services.scheduler.core.messages import Priority, WorkerState
from services.scheduler.core.queue import FairQueue, Waiter
from services.scheduler.core.state import State
from tests.unit.services.scheduler.core.driver import VERSION, Core, settings


def _busy() -> Core:
    """Two full workers, one granted and one running execution, one that waits."""
    core = Core(settings(queue_length_max=1))
    core.register("a")
    core.register("b")
    core.ask("e1")
    core.ask("e2")
    core.report("a", started=("e1",))
    core.ask("e3")
    return core


def _waiter(execution_id: str) -> Waiter:
    return Waiter(
        execution_id=execution_id,
        model_version=VERSION,
        project="",
        excluded=frozenset(),
        asked_s=0.0,
        give_up_s=0.0,
    )


def _lose_slot_on_worker(state: State) -> None:
    state.workers["workers/a"].slots.clear()


def _lose_slot_by_id(state: State) -> None:
    state.slots_by_id.clear()


def _forget_that_it_has_to_start(state: State) -> None:
    state.unstarted.clear()


def _leave_slot_on_replaced_worker(state: State) -> None:
    slots = state.workers["workers/a"].slots
    del state.workers["workers/a"]
    state.workers["workers/b"].slots.update(slots)


def _leave_slot_on_lost_worker(state: State) -> None:
    state.workers["workers/a"].state = WorkerState.LOST


def _leave_lost_worker_ready(state: State) -> None:
    state.workers["workers/b"].state = WorkerState.DRAINING


def _wait_with_slot(state: State) -> None:
    waiter = _waiter("e1")
    state.waiting["e1"] = waiter
    state.queues[VERSION].put(waiter)


def _lose_waiter(state: State) -> None:
    state.waiting.clear()


def _overfill_queue(state: State) -> None:
    state.queues[VERSION].put(_waiter("e4"))


def _miscount_queue(state: State) -> None:
    state.queues[VERSION]._lengths[Priority.STANDARD] = 7


def _wait_for_nobody(state: State) -> None:
    state.ready.clear()


def _wait_beside_free_worker(state: State) -> None:
    state.remove_slot(state.slots["e1"])


def _miscount_places(state: State) -> None:
    state.workers["workers/b"].used += 1


def _widen_a_spare(state: State) -> None:
    slot = state.slots["e2"]
    state.mark_spare(slot)
    slot.places = 2


def _miscount_wide_waiters(state: State) -> None:
    state.wide[VERSION, Priority.STANDARD] = {"e3": _waiter("e3")}


def _keep_an_empty_queue(state: State) -> None:
    state.queues["models/none/versions/1"] = FairQueue()


def _miscount_spares(state: State) -> None:
    state.slots["e2"].is_spare = True


def _keep_a_spare_that_runs(state: State) -> None:
    state.mark_spare(state.slots["e1"])


@pytest.mark.parametrize(
    ("damage", "want"),
    [
        (_miscount_places, "places of workers/b are miscounted"),
        (_widen_a_spare, "spare of workers/b has several places"),
        (_miscount_wide_waiters, "several places are miscounted"),
        (_keep_an_empty_queue, "models/none/versions/1 is empty"),
        (_miscount_spares, "spares of workers/b are miscounted"),
        (_keep_a_spare_that_runs, "spare of workers/a has started"),
        (_lose_slot_on_worker, "slots differ"),
        (_lose_slot_by_id, "slots differ"),
        (_forget_that_it_has_to_start, "unstarted"),
        (_leave_slot_on_replaced_worker, "replaced worker"),
        (_leave_slot_on_lost_worker, "lost worker"),
        (_leave_lost_worker_ready, "index of ready workers"),
        (_wait_with_slot, "given and waited for"),
        (_lose_waiter, "waiters differ"),
        (_overfill_queue, "has 2 waiters"),
        (_miscount_queue, "miscounted"),
        (_wait_for_nobody, "waits for nobody"),
        (_wait_beside_free_worker, "beside a worker with room"),
    ],
)
def test_damage_is_found(damage: Callable[[State], None], want: str) -> None:
    state = _busy().state
    assert state.check_integrity() == []

    damage(state)

    assert any(want in problem for problem in state.check_integrity())


def test_slot_ids_differ_between_processes() -> None:
    first, second = State(settings(), "one", 0.0), State(settings(), "two", 0.0)
    worker = _busy().worker("a")

    got = {state.add_slot(worker, "x", None).slot_id for state in (first, second)}

    assert len(got) == 2
