"""Embeddings of the llamacpp engine: the mean of the last hidden states, scaled to length 1.

A second context over the same weights gives the states, so embedding takes no slot from those who
generate. It is made when the first input comes. Inputs are computed in chunks between the steps of
the batch in flight, oldest first, so that generation goes on meanwhile.

EmbeddingQueue is pure: it knows no ctypes. LlamaStates is what computes for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from services.worker.engine.llamacpp_api import open_library
from services.worker.engine.llamacpp_columns import Columns
from services.worker.engine.llamacpp_decoder import DecodeFailedError
from services.worker.engine.llamacpp_model import LlamaModel, decode_rows, view_floats

Floats = npt.NDArray[np.float32]
Job = int
Outcome = Floats | str
"""Vectors, shape (inputs, dimensions), or why there are none."""

SLOTS_MAX: Final = 4
"""Inputs at the same time; each takes the KV cache of one more context."""


class StateSource(Protocol):
    """What computes rows of (token, position, slot) into hidden states.

    The caller writes the first n entries of the columns, ascending by slot.

    Attributes:
        columns: of as many rows as one step may have.
        slots: sequences.
        vocabulary_size: ids are below.
        context_length: tokens of a sequence.
    """

    columns: Columns
    slots: int
    vocabulary_size: int
    context_length: int

    def states(self, rows: int) -> Floats:
        """Computes; returns the state of each row, valid until the next call.

        Raises:
            DecodeFailedError: nothing can be said about what the slots hold.
        """
        ...

    def forget(self, slot: int) -> None:
        """Drops the tokens of a slot."""
        ...


class LlamaStates:
    """The StateSource over a loaded model.

    Args:
        model: whose weights are used.
        slots: sequences.
        rows: most of them in a step.

    Raises:
        DecodeFailedError: there is no memory for a second context.
    """

    def __init__(self, model: LlamaModel, *, slots: int, rows: int) -> None:
        self._llama = open_library()
        context = model.make_state_context(slots, rows)
        if context is None:
            self._llama.take_errors()
            raise DecodeFailedError("there is no memory for a context that embeds")
        memory = self._llama.get_memory(context)
        if memory is None:
            raise DecodeFailedError("this model has no states to embed with")
        self._context, self._memory = context, memory
        self._dimensions = model.embedding_dimensions
        self.columns = Columns(rows)
        self.columns.wanted[:] = 1
        self.slots = slots
        self.vocabulary_size = model.vocabulary_size
        self.context_length = model.context_length

    def states(self, rows: int) -> Floats:
        """Computes the first rows of the columns; see StateSource."""
        decode_rows(self._llama, self._context, self.columns, rows)
        address = self._llama.get_embeddings(self._context)
        if address is None:
            raise DecodeFailedError("llama.cpp computed no states")
        return view_floats(address, rows, self._dimensions)

    def forget(self, slot: int) -> None:
        """Drops the tokens of a slot; see StateSource."""
        self._llama.memory_seq_rm(self._memory, slot, -1, -1)


@dataclass(slots=True)
class _Job:
    """Inputs that are asked for together, and the vectors that are known already."""

    number: Job
    inputs: Sequence[Sequence[int]]
    vectors: dict[int, Floats] = field(default_factory=dict)


@dataclass(slots=True)
class _Input:
    """An input in a slot: how far it is, and the sum of its states."""

    job: _Job
    place: int
    ids: npt.NDArray[np.int32]
    done: int = 0
    total: npt.NDArray[np.float64] | None = None


class EmbeddingQueue:
    """Inputs that wait for their vectors. Not thread-safe.

    Args:
        open_source: makes the source, when it is needed first; may raise DecodeFailedError.
        rows: most tokens in one step.
    """

    def __init__(self, open_source: Callable[[], StateSource], *, rows: int) -> None:
        self._open_source = open_source
        self._source: StateSource | None = None
        self._rows = rows
        self._jobs: dict[Job, _Job] = {}
        self._waiting: list[_Input] = []
        self._running: dict[int, _Input] = {}  # By slot, oldest first.
        self._outcomes: list[tuple[Job, Outcome]] = []

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute and nothing to tell."""
        return not (self._jobs or self._outcomes)

    def add(self, number: Job, inputs: Sequence[Sequence[int]]) -> None:
        """Queues a job behind the others; answers it at once when it cannot be done."""
        try:
            if self._source is None:
                self._source = self._open_source()
            fault = _find_fault(inputs, self._source)
        except DecodeFailedError as error:
            fault = str(error)
        if fault:
            self._outcomes.append((number, fault))
            return
        self._jobs[number] = job = _Job(number, inputs)
        self._waiting += [
            _Input(job, place, np.array(ids, np.int32)) for place, ids in enumerate(inputs)
        ]

    def drop(self, number: Job) -> None:
        """Forgets a job that nobody waits for any more. Unknown ones are ignored."""
        if self._jobs.pop(number, None) is None:
            return
        self._waiting = [one for one in self._waiting if one.job.number != number]
        for slot in [slot for slot, one in self._running.items() if one.job.number == number]:
            self._free(slot)

    def step(self) -> list[tuple[Job, Outcome]]:
        """Computes a chunk of the oldest inputs; returns the jobs that are through."""
        if self._jobs and self._source is not None:
            self._admit(self._source)
            self._compute(self._source)
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def _admit(self, source: StateSource) -> None:
        for slot in range(source.slots):
            if self._waiting and slot not in self._running:
                self._running[slot] = self._waiting.pop(0)

    def _compute(self, source: StateSource) -> None:
        plan: list[tuple[int, int]] = []  # (slot, tokens)
        left = self._rows
        for slot, one in self._running.items():
            count = min(len(one.ids) - one.done, left)
            if count:
                plan.append((slot, count))
            left -= count
        plan.sort()
        rows = self._fill(source.columns, plan)
        try:
            states = source.states(rows)
        except DecodeFailedError as error:
            self._fail(plan, str(error))
            return
        start = 0
        for slot, count in plan:
            # A failure of one input drops the others of its job.
            if slot in self._running:
                self._take(slot, states[start : start + count])
            start += count

    def _fill(self, columns: Columns, plan: Sequence[tuple[int, int]]) -> int:
        start = 0
        for slot, count in plan:
            one, end = self._running[slot], start + count
            columns.tokens[start:end] = one.ids[one.done : one.done + count]
            columns.positions[start:end] = np.arange(one.done, one.done + count)
            columns.slots[start:end] = slot
            start = end
        return start

    def _take(self, slot: int, states: Floats) -> None:
        one = self._running[slot]
        total = states.sum(axis=0, dtype=np.float64)
        one.total = total if one.total is None else one.total + total
        one.done += len(states)
        if one.done < len(one.ids):
            return
        self._free(slot)
        length = float(np.linalg.norm(one.total))
        job = one.job
        if not (np.isfinite(length) and length > 0):
            self._outcomes.append((job.number, "the model gave no finite states"))
            self.drop(job.number)
            return
        job.vectors[one.place] = (one.total / length).astype(np.float32)
        if len(job.vectors) == len(job.inputs):
            vectors = np.stack([job.vectors[place] for place in range(len(job.inputs))])
            self._outcomes.append((job.number, vectors))
            del self._jobs[job.number]

    def _fail(self, plan: Sequence[tuple[int, int]], message: str) -> None:
        for number in {self._running[slot].job.number for slot, _ in plan}:
            self._outcomes.append((number, message))
            self.drop(number)

    def _free(self, slot: int) -> None:
        del self._running[slot]
        if self._source is not None:
            self._source.forget(slot)


def _find_fault(inputs: Sequence[Sequence[int]], source: StateSource) -> str:
    if not inputs:
        return "there are no inputs"
    for ids in inputs:
        if not 1 <= len(ids) <= source.context_length:
            return "an input is empty or longer than the context"
        if not (min(ids) >= 0 and max(ids) < source.vocabulary_size):
            return "a token id is not in the vocabulary"
    return ""
