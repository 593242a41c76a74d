"""The batch in flight of the llamacpp engine: who has a slot, what the next step computes.

One step is one call of the decoder for each adapter in use (llama.cpp applies an adapter to a whole
call; mostly there is one, or none), with

    one row       for each lane that decodes: its last token;
    a chunk       of each prompt that is being prefilled, oldest first, at most prefill_tokens in
                  all, so that a long prompt delays the others' next token by one chunk only.

A slot is one sequence of the KV cache; llamacpp_slots says which one is taken and what it may hold
already. State lives in columns indexed by slot, not in objects per lane, so that a step costs about
the same Python for 1 lane and for 64.

Pure: no sockets, no ctypes, no clock. Whoever calls step() decides on which thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from services.worker.engine.base import (
    AdapterUnusable,
    Ended,
    EndReason,
    EngineRequest,
    Lane,
    Prefilled,
)
from services.worker.engine.llamacpp_adapters import AdapterShelf
from services.worker.engine.llamacpp_company import (
    NO_FINITE_LOGITS,
    NO_ID,
    Company,
    Occupant,
    place_scores,
)
from services.worker.engine.llamacpp_decoder import DecodeFailedError, Decoder, Floats
from services.worker.engine.llamacpp_logits import LogitRules, MatcherError, changes_logits
from services.worker.engine.llamacpp_prefill import Chunk, plan_prefill, score_prompts
from services.worker.engine.llamacpp_queue import Compile, Waiting, WaitingQueue
from services.worker.engine.llamacpp_slots import Slot, SlotPool
from services.worker.engine.wire import Counters, Report

_FAILED_STEPS_MAX: Final = 3
"""Steps in a row without one lane that could be computed, after which the engine gives up."""
_COMPILER_WAIT_S: Final = 0.005
"""How long a step without anything else to do waits for a constraint; aborts wait as long."""
_SAMPLED: Final = 1
_SCORED: Final = 2


class InflightBatch:
    """In-flight batching over a decoder. Not thread-safe.

    Args:
        decoder: with capacity sequences, capacity + prefill_tokens rows, and logits of
            capacity + SCORED_ROWS_MAX of them.
        capacity: slots.
        context_length: prompt and output of one lane together.
        prefill_tokens: most prompt tokens in one step.
        shelf: the adapters; None when there are none.
        compile_grammar: compiles constraints on a thread of its own; None when there are none.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        capacity: int,
        context_length: int,
        prefill_tokens: int,
        shelf: AdapterShelf | None = None,
        compile_grammar: Compile | None = None,
    ) -> None:
        self._decoder = decoder
        self._context_length = context_length
        self._prefill_tokens = prefill_tokens
        self._shelf = shelf
        self._waiting = WaitingQueue(compile_grammar)
        self._slot_of: dict[Lane, Slot] = {}
        self._occupants: dict[Slot, Occupant] = {}
        self._prefilling: dict[Slot, None] = {}  # An ordered set, oldest first.
        self._pool = SlotPool(capacity, context_length, keeps=decoder.keeps_prefixes)
        self._report = Report()
        self._taken = 0
        self._failed_steps = 0

        # By slot.
        self._lanes = np.zeros(capacity, np.int64)
        self._is_decoding = np.zeros(capacity, np.bool_)
        self._tokens = np.zeros(capacity, np.int32)  # Sampled last, not yet in the KV cache.
        self._positions = self._pool.lengths
        self._outputs = np.zeros(capacity, np.int64)  # Output tokens so far.
        self._limits = np.zeros(capacity, np.int64)  # Output tokens at which the lane ends.
        self._ends_by_itself = np.zeros(capacity, np.bool_)

        # What becomes of the logits of each row of the decoder.
        self._roles = np.zeros(len(decoder.tokens), np.int8)
        # By adapter; made anew when a lane joins or leaves those that decode.
        self._companies: dict[str, Company] = {}
        self._nobody = Company(np.zeros(0, np.intp), [], len(decoder.is_end))

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
        self._waiting.add(lane, request)

    def abort(self, lane: Lane) -> None:
        """Ends a lane now; its slot is free for the next step. Unknown lanes are ignored."""
        slot = self._slot_of.get(lane)
        if self._waiting.remove(lane):
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
        chunks = list(
            plan_prefill(self._prefilling, self._occupants, self._positions, self._prefill_tokens)
        )
        if not chunks and not self._companies and not self._report.ended:
            self._waiting.wait_for_compiler(_COMPILER_WAIT_S)
        adapters = dict.fromkeys(self._companies)
        for chunk in chunks:
            adapters[chunk.occupant.adapter] = None
        if len(adapters) == 1:
            self._compute(next(iter(adapters)), chunks)
            return
        for adapter in adapters:
            self._compute(adapter, [one for one in chunks if one.occupant.adapter == adapter])

    def take_report(self) -> tuple[Counters, Report]:
        """What happened since the last call, and the load now."""
        report, self._report = self._report, Report()
        taken, self._taken = self._taken, 0
        counters = Counters(
            running=len(self._occupants),
            waiting=len(self._waiting),
            waiting_tokens=self._waiting.tokens
            + sum(
                len(self._occupants[slot].ids) - int(self._positions[slot])
                for slot in self._prefilling
            ),
            # What ended lanes left behind makes room at once, so it is not in use.
            kv_used_tokens=int(self._positions.sum()) - self._pool.kept_tokens,
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
        if len(request.prompt_ids) + len(request.continue_ids) > self._context_length:
            return "the prompt is longer than the context"
        biased = [token_id for token_id, _ in request.sampling.logit_bias]
        for ids in (request.prompt_ids, request.continue_ids, biased):
            if ids and not (min(ids) >= 0 and max(ids) < size):
                return "a token id is not in the vocabulary"
        return ""

    def _limit_of(self, request: EngineRequest) -> tuple[int, EndReason]:
        """How many output tokens there can be, and why no more."""
        room = self._context_length - len(request.prompt_ids)
        if request.max_output_tokens <= room:
            return request.max_output_tokens, EndReason.MAX_TOKENS
        return room, EndReason.CONTEXT_FULL

    def _admit(self) -> None:
        if not self._waiting or not self._pool.free_count:
            return
        is_passed = is_shelf_full = False
        for waiting in self._waiting:
            request = waiting.request
            if request.is_background and is_passed:
                # It starts when nothing else waits.
                return
            if request.adapter is not None and self._shelf is not None:
                # Lanes behind one that waits for room on the shelf must not keep it full.
                is_shelf_full = is_shelf_full or not self._shelf.has_room_for(request.adapter)
            is_compiling = waiting.compiling is not None and not waiting.compiling.done()
            if is_compiling or (is_shelf_full and request.adapter is not None):
                is_passed = True
                continue
            self._let_in(waiting)
            if not self._pool.free_count:
                return

    def _let_in(self, waiting: Waiting) -> None:
        """Gives a lane a slot, or ends it when its constraint or its adapter is of no use."""
        request, lane = waiting.request, waiting.lane
        try:
            rules = self._make_rules(waiting)
            if rules is None or not rules.is_over:
                self._take_adapter(request)
        except (MatcherError, AdapterUnusable) as error:
            self._waiting.remove(lane)
            self._report.ended.append(Ended(lane, EndReason.FAILED, None, str(error)))
            return
        self._waiting.remove(lane)
        if rules is not None and rules.is_over:
            self._report.ended.append(Ended(lane, EndReason.END_OF_SEQUENCE))
            return
        limit, reason = self._limit_of(request)
        ids = np.array(request.prompt_ids + request.continue_ids, np.int32)
        occupant = Occupant(lane, request, ids, reason, rules)
        slot = self._place(occupant)
        self._occupants[slot] = occupant
        self._slot_of[lane] = slot
        self._prefilling[slot] = None
        self._lanes[slot] = lane
        self._outputs[slot] = len(request.continue_ids)
        self._limits[slot] = limit
        self._ends_by_itself[slot] = not request.ignore_eos or (
            rules is not None and rules.is_constrained
        )

    def _make_rules(self, waiting: Waiting) -> LogitRules | None:
        request = waiting.request
        if not changes_logits(request):
            return None
        if waiting.compiling is not None:
            return LogitRules(request, self._decoder.is_end, waiting.matcher())
        if request.constraint is not None:
            raise MatcherError("this model's output cannot be constrained")
        return LogitRules(request, self._decoder.is_end, None)

    def _take_adapter(self, request: EngineRequest) -> None:
        if request.adapter is None:
            return
        if self._shelf is None:
            raise AdapterUnusable("this engine takes no adapters")
        self._shelf.take(request.adapter)

    def _place(self, occupant: Occupant) -> Slot:
        """Finds a slot, and has it hold the longest prefix that the cache has."""
        request = occupant.request
        # The log-probabilities of a prompt need all of its logits.
        reads = request.reads_cache and not request.prompt_logprobs
        place = self._pool.take((request.cache_salt, occupant.adapter), occupant.ids, reads=reads)
        if place.source != place.slot:
            self._decoder.forget(place.slot, 0)
            self._decoder.copy(place.source, place.slot)
        if not self._decoder.forget(place.slot, place.common):
            self._decoder.forget(place.slot, 0)
            self._positions[place.slot] = 0
        occupant.cached_tokens = min(int(self._positions[place.slot]), len(request.prompt_ids))
        return place.slot

    def _finish(
        self, slot: Slot, reason: EndReason, stop_token_id: int | None = None, message: str = ""
    ) -> None:
        occupant = self._occupants.pop(slot)
        del self._slot_of[occupant.lane]
        self._prefilling.pop(slot, None)
        self._is_decoding[slot] = False
        # What a failure left may be broken.
        if not self._pool.give_back(slot, keeps=reason is not EndReason.FAILED):
            self._decoder.forget(slot, 0)
        if occupant.request.adapter is not None and self._shelf is not None:
            self._shelf.give_back(occupant.request.adapter)
        self._report.ended.append(Ended(occupant.lane, reason, stop_token_id, message))

    def _regroup(self) -> None:
        """Makes the companies anew after a lane joined or left those that decode."""
        members: dict[str, list[Slot]] = {}
        for slot in np.flatnonzero(self._is_decoding).tolist():
            members.setdefault(self._occupants[slot].adapter, []).append(slot)
        self._companies = {
            adapter: Company(
                np.array(slots, np.intp),
                [self._occupants[slot] for slot in slots],
                len(self._decoder.is_end),
            )
            for adapter, slots in members.items()
        }

    # One step.

    def _compute(self, adapter: str, chunks: list[Chunk]) -> None:
        """Computes the rows and chunks that have an adapter."""
        company = self._companies.get(adapter, self._nobody)
        try:
            self._use_adapter(adapter)
            count = self._fill(company.slots, chunks)
            logits = self._divide(self._decoder.decode(count), count, chunks)
        except DecodeFailedError:
            logits = self._decode_apart(adapter, chunks)
        else:
            self._failed_steps = 0
            self._advance(company.slots, chunks)
        company = self._companies.get(adapter, self._nobody)
        if company.slots.size:
            self._sample(company, logits)

    def _use_adapter(self, adapter: str) -> None:
        if self._shelf is not None:
            self._decoder.use_adapter(self._shelf.handle_of(adapter) if adapter else None)

    def _fill(self, rows: npt.NDArray[np.intp], chunks: Sequence[Chunk]) -> int:
        """Writes the decoder's columns; returns how many rows there are."""
        decoder, roles = self._decoder, self._roles
        count = rows.size
        decoder.tokens[:count] = self._tokens[rows]
        decoder.positions[:count] = self._positions[rows]
        decoder.slots[:count] = rows
        decoder.wanted[:count] = _SAMPLED
        if not chunks:
            return count
        roles[:count] = _SAMPLED
        for chunk in chunks:
            ids = chunk.occupant.ids
            end = count + chunk.stop - chunk.start
            decoder.tokens[count:end] = ids[chunk.start : chunk.stop]
            decoder.positions[count:end] = np.arange(chunk.start, chunk.stop)
            decoder.slots[count:end] = chunk.slot
            roles[count : count + chunk.scored] = _SCORED
            roles[count + chunk.scored : end] = 0
            if chunk.stop == len(ids):
                roles[end - 1] = _SAMPLED
            count = end
        order = np.argsort(decoder.slots[:count], kind="stable")
        for column in (decoder.tokens, decoder.positions, decoder.slots, roles):
            column[:count] = column[order]
        decoder.wanted[:count] = roles[:count] != 0
        return count

    def _divide(self, logits: Floats, count: int, chunks: Sequence[Chunk]) -> Floats:
        """Reports the scores of prompts; returns the logits from which tokens are drawn."""
        if not (chunks and any(chunk.occupant.request.prompt_logprobs for chunk in chunks)):
            return logits
        roles = self._roles[:count]
        roles = roles[roles != 0]
        self._report.prompt_scores += score_prompts(logits[roles == _SCORED], chunks)
        sampled: Floats = logits[roles == _SAMPLED]
        return sampled

    def _advance(self, rows: npt.NDArray[np.intp], chunks: Sequence[Chunk]) -> None:
        """Notes what the KV cache holds now; lanes whose prompt is complete join the rows."""
        held = self._pool.ids
        positions = self._positions[rows]
        held[rows, positions] = self._tokens[rows]
        self._positions[rows] = positions + 1
        is_joined = False
        for chunk in chunks:
            occupant = chunk.occupant
            held[chunk.slot, chunk.start : chunk.stop] = occupant.ids[chunk.start : chunk.stop]
            self._positions[chunk.slot] = chunk.stop
            if chunk.stop == len(occupant.ids):
                del self._prefilling[chunk.slot]
                self._is_decoding[chunk.slot] = True
                self._report.prefilled.append(Prefilled(occupant.lane, occupant.cached_tokens))
                is_joined = True
        if is_joined:
            self._regroup()

    def _sample(self, company: Company, logits: Floats) -> None:
        """Draws a token for every row and ends the lanes that are through."""
        rows = company.slots
        outputs = self._outputs[rows]
        drawn = company.draw(logits, outputs)
        ids = drawn.ids
        self._tokens[rows] = ids
        self._outputs[rows] = outputs + 1
        is_last = outputs + 1 >= self._limits[rows]
        # NO_ID would look at the last token of the vocabulary; such a row is through anyway.
        is_end = self._decoder.is_end[ids] & self._ends_by_itself[rows]
        is_through = is_last | is_end | (ids == NO_ID)
        is_shown = ~is_end & (ids != NO_ID)
        stopped = [row for row, stops in company.stops if int(ids[row]) in stops]
        if stopped:
            is_through[stopped] = True
            is_shown[stopped] = False
        if company.has_rules:
            over = company.take(ids, is_shown, drawn.faults)
            is_end[over] = True
            is_through[[*over, *drawn.faults]] = True
            is_shown[list(drawn.faults)] = False
        if drawn.scores is not None:
            self._report.scores.append(place_scores(drawn.scores, is_shown, self._report.row_count))
        if not is_through.any():
            self._report.lanes += self._lanes[rows].tobytes()
            self._report.token_ids += ids.astype(np.int32).tobytes()
            return
        self._report.lanes += self._lanes[rows[is_shown]].tobytes()
        self._report.token_ids += ids[is_shown].astype(np.int32).tobytes()
        for row in np.flatnonzero(is_through).tolist():
            slot = int(rows[row])
            if row in drawn.faults:
                self._finish(slot, EndReason.CONSTRAINT_LIMIT, message=drawn.faults[row])
            elif ids[row] == NO_ID:
                self._finish(slot, EndReason.FAILED, message=NO_FINITE_LOGITS)
            else:
                self._end_row(slot, int(ids[row]), is_at_end=bool(is_end[row]))
        self._regroup()

    def _end_row(self, slot: Slot, token_id: int, *, is_at_end: bool) -> None:
        occupant = self._occupants[slot]
        if is_at_end:
            self._finish(slot, EndReason.END_OF_SEQUENCE)
        elif token_id in occupant.request.stop_token_ids:
            self._finish(slot, EndReason.STOP_TOKEN, stop_token_id=token_id)
        else:
            self._finish(slot, occupant.end_at_limit)

    # When a step fails.

    def _decode_apart(self, adapter: str, chunks: list[Chunk]) -> Floats:
        """Computes a step that failed lane by lane; ends those that fail alone, too.

        Returns:
            logits of the rows, in order of slots, as from the whole step.
        """
        chunk_of = {chunk.slot: chunk for chunk in chunks}
        rows = self._companies.get(adapter, self._nobody).slots.tolist()
        slots = sorted({*rows, *chunk_of})
        done: list[Chunk] = []
        logits = [np.zeros((0, len(self._decoder.is_end)), np.float32)]
        errors: list[DecodeFailedError] = []
        for slot in slots:
            chunk = chunk_of.get(slot)
            try:
                logits.append(self._decode_alone(adapter, slot, chunk))
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
        self._advance(self._companies.get(adapter, self._nobody).slots, done)
        return np.concatenate(logits)

    def _decode_alone(self, adapter: str, slot: Slot, chunk: Chunk | None) -> Floats:
        self._use_adapter(adapter)
        if not self._decoder.forget(slot, int(self._positions[slot])):
            raise DecodeFailedError("a failed step cannot be taken back in this model's memory")
        chunks = [chunk] if chunk else []
        count = self._fill(np.array([] if chunk else [slot], np.intp), chunks)
        return self._divide(self._decoder.decode(count), count, chunks).copy()
