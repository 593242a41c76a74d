"""Who is embedded when, over a source of states that checks what it is asked."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import numpy.typing as npt
import pytest

from services.worker.engine.llamacpp_columns import Columns
from services.worker.engine.llamacpp_decoder import DecodeFailedError
from services.worker.engine.llamacpp_embedding import EmbeddingQueue, Outcome

ROWS = 8
SIZE = 100
CONTEXT = 30


class FakeStates:
    """The state of a token is (its id, the sum of its sequence until there, 1)."""

    def __init__(self) -> None:
        self.columns = Columns(ROWS)
        self.slots = 2
        self.vocabulary_size = SIZE
        self.context_length = CONTEXT
        self.histories: dict[int, list[int]] = defaultdict(list)
        self.fails = False
        self.steps: list[list[int]] = []

    def states(self, rows: int) -> npt.NDArray[np.float32]:
        if self.fails:
            raise DecodeFailedError("no room")
        assert 1 <= rows <= ROWS
        slots = self.columns.slots[:rows].tolist()
        assert slots == sorted(slots)
        self.steps.append(slots)
        states = []
        for row, slot in enumerate(slots):
            history = self.histories[slot]
            assert self.columns.positions[row] == len(history)
            history.append(int(self.columns.tokens[row]))
            states.append([history[-1], sum(history), 1 if history[-1] != 99 else np.nan])
        return np.array(states, np.float32)

    def forget(self, slot: int) -> None:
        self.histories.pop(slot, None)


def expected(ids: list[int]) -> npt.NDArray[np.float32]:
    states = np.array([[token, sum(ids[: place + 1]), 1] for place, token in enumerate(ids)])
    mean = states.mean(axis=0)
    unit: npt.NDArray[np.float32] = (mean / np.linalg.norm(mean)).astype(np.float32)
    return unit


class World:
    def __init__(self) -> None:
        self.source = FakeStates()
        self.opened = 0
        self.queue = EmbeddingQueue(self.open, rows=ROWS)

    def open(self) -> FakeStates:
        self.opened += 1
        return self.source

    def run(self) -> dict[int, Outcome]:
        outcomes: dict[int, Outcome] = {}
        while not self.queue.is_idle:
            outcomes.update(self.queue.step())
        return outcomes


@pytest.fixture
def world() -> World:
    return World()


def test_every_input_gets_the_mean_of_its_own_states(world: World) -> None:
    jobs = {
        1: [[3], [4, 5, 6], list(range(1, 21))],
        2: [[7] * CONTEXT],
        3: [[1, 2]] * 5,
    }
    for number, inputs in jobs.items():
        world.queue.add(number, inputs)

    outcomes = world.run()

    assert outcomes.keys() == jobs.keys()
    for number, inputs in jobs.items():
        assert np.allclose(outcomes[number], [expected(ids) for ids in inputs], atol=1e-6)
    assert world.opened == 1
    assert not any(world.source.histories.values())


def test_a_step_takes_no_more_than_its_rows_and_the_oldest_first(world: World) -> None:
    world.queue.add(1, [[1] * 20])
    world.queue.add(2, [[2] * 3])

    told = [[number for number, _ in world.queue.step()] for _ in range(3)]

    assert world.source.steps == [[0] * 8, [0] * 8, [0] * 4 + [1] * 3]
    assert [sorted(numbers) for numbers in told] == [[], [], [1, 2]]


def test_a_dropped_job_costs_no_step_more(world: World) -> None:
    world.queue.add(1, [[1] * 20, [2] * 20, [3] * 20])
    world.queue.add(2, [[4]])
    world.queue.step()

    world.queue.drop(1)
    world.queue.drop(77)

    assert world.run().keys() == {2}
    assert world.source.steps[1:] == [[0]]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "no inputs"),
        ([[1], []], "empty or longer"),
        ([[1] * (CONTEXT + 1)], "empty or longer"),
        ([[SIZE]], "not in the vocabulary"),
        ([[-1]], "not in the vocabulary"),
    ],
)
def test_what_cannot_be_embedded_is_refused_and_harms_nobody(
    world: World, inputs: list[list[int]], message: str
) -> None:
    world.queue.add(1, [[5, 6]])
    world.queue.add(2, inputs)

    outcomes = world.run()

    assert message in str(outcomes[2])
    assert np.allclose(outcomes[1], [expected([5, 6])], atol=1e-6)


def test_a_step_that_fails_ends_its_jobs_and_leaves_no_tokens(world: World) -> None:
    world.queue.add(1, [[1] * 12, [2]])
    world.queue.step()
    world.source.fails = True
    assert world.run() == {1: "no room"}
    world.source.fails = False

    world.queue.add(2, [[8, 9]])

    assert np.allclose(world.run()[2], [expected([8, 9])], atol=1e-6)


def test_states_that_are_no_numbers_fail_their_job_alone(world: World) -> None:
    world.queue.add(1, [[99], [2]])
    world.queue.add(2, [[5]])

    outcomes = world.run()

    assert outcomes[1] == "the model gave no finite states"
    assert np.allclose(outcomes[2], [expected([5])], atol=1e-6)


def test_without_memory_for_a_context_every_job_is_refused() -> None:
    def refuse() -> FakeStates:
        raise DecodeFailedError("there is no memory")

    queue = EmbeddingQueue(refuse, rows=ROWS)
    queue.add(1, [[1]])

    assert queue.step() == [(1, "there is no memory")]
    assert queue.is_idle
