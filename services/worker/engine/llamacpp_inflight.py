"""The batch in flight of the llamacpp engine: who has a slot, what the next step computes.

One step is one call of the decoder with

    one row       for each lane that decodes: its last token;
    a chunk       of each prompt that is being prefilled, oldest first, at most prefill_tokens in
                  all, so that a long prompt delays the others' next token by one chunk only.

A slot is one sequence of the KV cache. State lives in columns indexed by slot, not in objects per
lane, so that a step costs about the same Python for 1 lane and for 64.

llama.cpp splits a batch wherever neighbouring sequence ids are not consecutive, and each piece
costs a pass over the weights. So the lowest free slot is taken first and rows go by slot.

Pure: no sockets, no ctypes, no clock. Whoever calls step() decides on which thread.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from services.worker.engine.base import Ended, EndReason, EngineRequest, Lane, Prefilled
from services.worker.engine.llamacpp_sampling import NO_ID, Sampler
from services.worker.engine.llamacpp_wire import Counters, Report

Slot = int
Ids = npt.NDArray[np.int32]
Slots = npt.NDArray[np.intp]

_FAILED_STEPS_MAX: Final = 3
"""Steps in a row without one lane that could be computed, after which the engine gives up."""


class DecodeFailedError(Exception):
    """The decoder could not compute a step. Its message holds nothing of a prompt or an output."""


class Decoder(Protocol):
    """What computes: rows of (token, position, slot) into logits, with a KV cache behind it.

    The caller writes the first n entries of the columns and calls decode(n).

    Attributes:
        tokens: int32, shape (rows,): token ids.
        positions: int32, shape (rows,): place in the sequence.
        slots: int32, shape (rows,): sequence, ascending.
        wanted: int8, shape (rows,): 1 where logits are wanted.
        is_end: bool, shape (vocabulary,): tokens that end a generation.
    """

    tokens: Ids
    positions: Ids
    slots: Ids
    wanted: npt.NDArray[np.int8]
    is_end: npt.NDArray[np.bool_]

    def decode(self, rows: int) -> npt.NDArray[np.float32]:
        """Computes; returns logits of the wanted rows, in order, valid until the next call.

        Raises:
            DecodeFailedError: the KV cache may hold part of the rows; forget() before going on.
        """
        ...

    def forget(self, slot: Slot, start: int) -> bool:
        """Drops the tokens of a slot from a position on; False when only all can be dropped."""
        ...


@dataclass(slots=True)
class _Occupant:
    """What the columns do not hold of a lane in a slot."""

    lane: Lane
    request: EngineRequest
    ids: Ids  # Of the prompt and what continues it.
    end_at_limit: EndReason


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Part of a prompt: ids[start:stop] of the occupant of a slot."""

    slot: Slot
    start: int
    stop: int


class InflightBatch:
    """In-flight batching over a decoder. Not thread-safe.

    Args:
        decoder: with capacity sequences and capacity + prefill_tokens rows.
        capacity: slots.
        context_length: prompt and output of one lane together.
        prefill_tokens: most prompt tokens in one step.
    """

    def __init__(
        self, decoder: Decoder, *, capacity: int, context_length: int, prefill_tokens: int
    ) -> None:
        self._decoder = decoder
        self._context_length = context_length
        self._prefill_tokens = prefill_tokens
        self._waiting: dict[Lane, EngineRequest] = {}  # In order of arrival.
        self._waiting_tokens = 0
        self._slot_of: dict[Lane, Slot] = {}
        self._occupants: dict[Slot, _Occupant] = {}
        self._prefilling: dict[Slot, None] = {}  # An ordered set, oldest first.
        self._free = list(range(capacity))
        self._report = Report()
        self._taken = 0
        self._failed_steps = 0

        # By slot.
        self._lanes = np.zeros(capacity, np.int64)
        self._is_decoding = np.zeros(capacity, np.bool_)
        self._tokens = np.zeros(capacity, np.int32)  # Sampled last, not yet in the KV cache.
        self._positions = np.zeros(capacity, np.int32)  # Tokens in the KV cache.
        self._outputs = np.zeros(capacity, np.int64)  # Output tokens so far.
        self._limits = np.zeros(capacity, np.int64)  # Output tokens at which the lane ends.
        self._ends_by_itself = np.zeros(capacity, np.bool_)

        # Of the rows of a step, in order of slots; made anew when a lane joins or leaves them.
        self._rows: Slots = np.zeros(0, np.intp)
        self._sampler = Sampler([], len(decoder.is_end))
        self._rows_with_stops: list[tuple[int, frozenset[int]]] = []

    @property
    def is_idle(self) -> bool:
        """Whether a step would have nothing to compute."""
        return not (self._waiting or self._occupants)

    def submit(self, lane: Lane, request: EngineRequest) -> None:
        """Queues a request behind the others; ends it at once when it cannot run."""
        self._taken += 1
        message = self._find_fault(request)
        if message:
            self._report.ended.append(Ended(lane, EndReason.FAILED, None, message))
            return
        limit, reason = self._limit_of(request)
        if len(request.continue_ids) >= limit:
            self._report.ended.append(Ended(lane, reason))
            return
        self._waiting[lane] = request
        self._waiting_tokens += _prefill_length(request)

    def abort(self, lane: Lane) -> None:
        """Ends a lane now; its slot is free for the next step. Unknown lanes are ignored."""
        slot = self._slot_of.get(lane)
        if lane in self._waiting:
            self._take_waiting(lane)
            self._report.ended.append(Ended(lane, EndReason.ABORTED))
        elif slot is not None:
            self._finish(slot, EndReason.ABORTED)
            self._regroup()

    def step(self) -> None:
        """Lets waiting lanes in and computes the next tokens of all.

        Raises:
            DecodeFailedError: several steps in a row failed for every lane.
        """
        self._admit()
        chunks = list(self._plan_prefill())
        if not chunks and not self._rows.size:
            return
        count = self._fill(chunks)
        try:
            logits = self._decoder.decode(count)
        except DecodeFailedError:
            logits = self._decode_apart(chunks)
        else:
            self._failed_steps = 0
            self._advance(chunks)
        if self._rows.size:
            self._sample(logits)

    def take_report(self) -> tuple[Counters, Report]:
        """What happened since the last call, and the load now."""
        report, self._report = self._report, Report()
        taken, self._taken = self._taken, 0
        counters = Counters(
            running=len(self._occupants),
            waiting=len(self._waiting),
            waiting_tokens=self._waiting_tokens
            + sum(
                len(self._occupants[slot].ids) - int(self._positions[slot])
                for slot in self._prefilling
            ),
            kv_used_tokens=int(self._positions.sum()),
            taken=taken,
        )
        return counters, report

    @property
    def has_news(self) -> bool:
        """Whether the next report tells more than counters."""
        return not self._report.is_empty

    # Coming and going.

    def _find_fault(self, request: EngineRequest) -> str:
        # The worker validated all this; the decoder would take the whole process down.
        size = len(self._decoder.is_end)
        if not request.prompt_ids:
            return "the prompt has no tokens"
        if _prefill_length(request) > self._context_length:
            return "the prompt is longer than the context"
        for ids in (request.prompt_ids, request.continue_ids):
            if ids and not (min(ids) >= 0 and max(ids) < size):
                return "a token id is not in the vocabulary"
        return ""

    def _limit_of(self, request: EngineRequest) -> tuple[int, EndReason]:
        """How many output tokens there can be, and why no more."""
        room = self._context_length - len(request.prompt_ids)
        if request.max_output_tokens <= room:
            return request.max_output_tokens, EndReason.MAX_TOKENS
        return room, EndReason.CONTEXT_FULL

    def _take_waiting(self, lane: Lane) -> EngineRequest:
        request = self._waiting.pop(lane)
        self._waiting_tokens -= _prefill_length(request)
        return request

    def _admit(self) -> None:
        while self._waiting and self._free:
            lane = next(iter(self._waiting))
            request = self._take_waiting(lane)
            slot = heapq.heappop(self._free)
            limit, reason = self._limit_of(request)
            self._occupants[slot] = _Occupant(
                lane, request, np.array(request.prompt_ids + request.continue_ids, np.int32), reason
            )
            self._slot_of[lane] = slot
            self._prefilling[slot] = None
            self._lanes[slot] = lane
            self._positions[slot] = 0
            self._outputs[slot] = len(request.continue_ids)
            self._limits[slot] = limit
            self._ends_by_itself[slot] = not request.ignore_eos

    def _finish(
        self, slot: Slot, reason: EndReason, stop_token_id: int | None = None, message: str = ""
    ) -> None:
        occupant = self._occupants.pop(slot)
        del self._slot_of[occupant.lane]
        self._prefilling.pop(slot, None)
        self._is_decoding[slot] = False
        self._positions[slot] = 0
        self._decoder.forget(slot, 0)
        heapq.heappush(self._free, slot)
        self._report.ended.append(Ended(occupant.lane, reason, stop_token_id, message))

    def _regroup(self) -> None:
        """Makes the rows anew after a lane joined or left those that decode."""
        self._rows = np.flatnonzero(self._is_decoding)
        requests = [self._occupants[slot].request for slot in self._rows.tolist()]
        self._sampler = Sampler(
            [request.sampling for request in requests], len(self._decoder.is_end)
        )
        self._rows_with_stops = [
            (row, request.stop_token_ids)
            for row, request in enumerate(requests)
            if request.stop_token_ids
        ]

    # One step.

    def _plan_prefill(self) -> Iterator[_Chunk]:
        left = self._prefill_tokens
        for slot in self._prefilling:
            start = int(self._positions[slot])
            stop = min(len(self._occupants[slot].ids), start + left)
            if start == stop:
                return
            yield _Chunk(slot, start, stop)
            left -= stop - start

    def _fill(self, chunks: list[_Chunk]) -> int:
        """Writes the decoder's columns; returns how many rows there are."""
        decoder, rows = self._decoder, self._rows
        count = rows.size
        decoder.tokens[:count] = self._tokens[rows]
        decoder.positions[:count] = self._positions[rows]
        decoder.slots[:count] = rows
        decoder.wanted[:count] = 1
        if not chunks:
            return count
        for chunk in chunks:
            ids = self._occupants[chunk.slot].ids
            end = count + chunk.stop - chunk.start
            decoder.tokens[count:end] = ids[chunk.start : chunk.stop]
            decoder.positions[count:end] = np.arange(chunk.start, chunk.stop)
            decoder.slots[count:end] = chunk.slot
            decoder.wanted[count:end] = 0
            decoder.wanted[end - 1] = chunk.stop == len(ids)
            count = end
        order = np.argsort(decoder.slots[:count], kind="stable")
        for column in (decoder.tokens, decoder.positions, decoder.slots, decoder.wanted):
            column[:count] = column[order]
        return count

    def _advance(self, chunks: list[_Chunk]) -> None:
        """Notes what the KV cache holds now; lanes whose prompt is complete join the rows."""
        self._positions[self._rows] += 1
        is_joined = False
        for chunk in chunks:
            occupant = self._occupants[chunk.slot]
            self._positions[chunk.slot] = chunk.stop
            if chunk.stop == len(occupant.ids):
                del self._prefilling[chunk.slot]
                self._is_decoding[chunk.slot] = True
                self._report.prefilled.append(Prefilled(occupant.lane, 0))
                is_joined = True
        if is_joined:
            self._regroup()

    def _sample(self, logits: npt.NDArray[np.float32]) -> None:
        """Draws a token for every row and ends the lanes that are through."""
        rows = self._rows
        outputs = self._outputs[rows]
        ids = self._sampler.draw(logits, outputs)
        self._tokens[rows] = ids
        self._outputs[rows] = outputs + 1
        is_last = outputs + 1 >= self._limits[rows]
        # NO_ID would look at the last token of the vocabulary; such a row is through anyway.
        is_end = self._decoder.is_end[ids] & self._ends_by_itself[rows]
        is_through = is_last | is_end | (ids == NO_ID)
        is_shown = ~is_end & (ids != NO_ID)
        stopped = [row for row, stops in self._rows_with_stops if int(ids[row]) in stops]
        if stopped:
            is_through[stopped] = True
            is_shown[stopped] = False
        if not is_through.any():
            self._report.lanes += self._lanes[rows].tobytes()
            self._report.token_ids += ids.astype(np.int32).tobytes()
            return
        self._report.lanes += self._lanes[rows[is_shown]].tobytes()
        self._report.token_ids += ids[is_shown].astype(np.int32).tobytes()
        for row in np.flatnonzero(is_through).tolist():
            self._end_row(int(rows[row]), int(ids[row]), is_at_end=bool(is_end[row]))
        self._regroup()

    def _end_row(self, slot: Slot, token_id: int, *, is_at_end: bool) -> None:
        occupant = self._occupants[slot]
        if token_id == NO_ID:
            self._finish(slot, EndReason.FAILED, message="the model gave no finite logits")
        elif is_at_end:
            self._finish(slot, EndReason.END_OF_SEQUENCE)
        elif token_id in occupant.request.stop_token_ids:
            self._finish(slot, EndReason.STOP_TOKEN, stop_token_id=token_id)
        else:
            self._finish(slot, occupant.end_at_limit)

    # When a step fails.

    def _decode_apart(self, chunks: list[_Chunk]) -> npt.NDArray[np.float32]:
        """Computes a step that failed lane by lane; ends those that fail alone, too.

        Returns:
            logits of the rows, in order of slots, as from the whole step.
        """
        chunk_of = {chunk.slot: chunk for chunk in chunks}
        slots = sorted({*self._rows.tolist(), *chunk_of})
        done: list[_Chunk] = []
        logits = [np.zeros((0, len(self._decoder.is_end)), np.float32)]
        errors: list[DecodeFailedError] = []
        for slot in slots:
            chunk = chunk_of.get(slot)
            try:
                logits.append(self._decode_alone(slot, chunk))
            except DecodeFailedError as error:
                errors.append(error)
                self._finish(slot, EndReason.FAILED, message=str(error))
            else:
                if chunk:
                    done.append(chunk)
        self._regroup()
        self._failed_steps = self._failed_steps + 1 if len(errors) == len(slots) else 0
        if self._failed_steps >= _FAILED_STEPS_MAX:
            raise errors[-1]
        self._advance(done)
        return np.concatenate(logits)

    def _decode_alone(self, slot: Slot, chunk: _Chunk | None) -> npt.NDArray[np.float32]:
        if not self._decoder.forget(slot, int(self._positions[slot])):
            raise DecodeFailedError("a failed step cannot be taken back in this model's memory")
        self._rows = np.array([] if chunk else [slot], np.intp)
        count = self._fill([chunk] if chunk else [])
        return self._decoder.decode(count).copy()


def _prefill_length(request: EngineRequest) -> int:
    return len(request.prompt_ids) + len(request.continue_ids)
