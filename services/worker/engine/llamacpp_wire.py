"""Frames between LlamaCppEngine and its child process, over one stream socket.

    frame   = length of body: uint32 | kind: uint8 | body
    SUBMIT  = fixed fields | prompt ids | continue ids | stop ids              (int32 columns)
    STEP    = fixed fields | lanes int64, ids int32 of the rows | lanes int64, cached int32 of the
              prefilled | lanes int64, stop ids int32, reasons uint8 of the ended | messages JSON

Both ends run on one machine, from one checkout: byte order is native and there is no version.
Nothing here is able to run code from the other side, unlike pickle.

Pure: no sockets, no asyncio.
"""

from __future__ import annotations

import array
import enum
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from services.worker.engine.base import (
    Ended,
    EndReason,
    EngineRequest,
    Lane,
    Prefilled,
    Sampling,
    StepBatch,
)

Value = str | int | float | bool | None
"""What the rare control messages carry, flat."""


class Kind(enum.IntEnum):
    """Kinds of frames."""

    START = 1  # to the child: settings, JSON
    SUBMIT = 2  # to the child
    ABORT = 3  # to the child
    READY = 4  # to the parent: facts about the model, JSON
    REFUSED = 5  # to the parent: why the child cannot start, JSON
    STEP = 6  # to the parent


@dataclass(slots=True, kw_only=True)
class Counters:
    """The load as the child saw it at the end of a step; the fields of base.EngineLoad.

    Attributes:
        running: lanes that hold a slot.
        waiting: lanes that wait for a slot.
        waiting_tokens: prompt tokens not yet in the KV cache, of running and waiting lanes.
        kv_used_tokens: tokens in the KV cache.
        taken: submits read since the last report; the parent counts the others as waiting.
    """

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    kv_used_tokens: int = 0
    taken: int = 0


@dataclass(slots=True)
class Report:
    """What one step of the child did, rows by column.

    Attributes:
        lanes: int64 column, native bytes.
        token_ids: int32 column, native bytes; as many as lanes.
        prefilled: as in base.StepBatch.
        ended: as in base.StepBatch.
    """

    lanes: bytes = b""
    token_ids: bytes = b""
    prefilled: list[Prefilled] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell but counters."""
        return not (self.lanes or self.prefilled or self.ended)


_FRAME: Final = struct.Struct("=IB")
_ABORT: Final = struct.Struct("=q")
_SUBMIT: Final = struct.Struct("=qQddiIIII?")
_STEP: Final = struct.Struct("=IIQQIIII")
_INT32_MAX: Final = 2**31 - 1
_SEED_MASK: Final = 2**64 - 1
_REASONS: Final = tuple(EndReason)
_REASON_CODES: Final = {reason: code for code, reason in enumerate(_REASONS)}


class FrameReader:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[tuple[Kind, bytes]]:
        """Takes what was received and returns the frames that are complete now."""
        if self._rest:
            data = self._rest + data
        frames = []
        start = 0
        while len(data) - start >= _FRAME.size:
            length, kind = _FRAME.unpack_from(data, start)
            end = start + _FRAME.size + length
            if end > len(data):
                break
            frames.append((Kind(kind), data[start + _FRAME.size : end]))
            start = end
        self._rest = data[start:]
        return frames


def pack_control(kind: Kind, values: Mapping[str, Value]) -> bytes:
    """Makes a START, READY or REFUSED frame."""
    return _frame(kind, json.dumps(values).encode())


def unpack_control(body: bytes) -> dict[str, Value]:
    """Reads a START, READY or REFUSED body."""
    values: dict[str, Value] = json.loads(body)
    return values


def pack_submit(lane: Lane, request: EngineRequest) -> bytes:
    """Makes a SUBMIT frame. Numbers beyond their column are cut to what means the same.

    Raises:
        OverflowError: a token id has no 32 bits, so it is in no vocabulary.
    """
    sampling = request.sampling
    fixed = _SUBMIT.pack(
        lane,
        sampling.seed & _SEED_MASK,
        sampling.temperature,
        sampling.top_p,
        min(sampling.top_k, _INT32_MAX),
        min(request.max_output_tokens, _INT32_MAX),
        len(request.prompt_ids),
        len(request.continue_ids),
        len(request.stop_token_ids),
        request.ignore_eos,
    )
    ids = array.array("i", request.prompt_ids)
    ids.extend(request.continue_ids)
    ids.extend(sorted(request.stop_token_ids))
    return _frame(Kind.SUBMIT, fixed + ids.tobytes())


def unpack_submit(body: bytes) -> tuple[Lane, EngineRequest]:
    """Reads a SUBMIT body."""
    lane, seed, temperature, top_p, top_k, max_output, prompt, continued, stops, ignore_eos = (
        _SUBMIT.unpack_from(body)
    )
    ids = array.array("i", body[_SUBMIT.size :])
    if len(ids) != prompt + continued + stops:
        raise ValueError("the columns of a submit frame do not fit its counts")
    request = EngineRequest(
        prompt_ids=tuple(ids[:prompt]),
        continue_ids=tuple(ids[prompt : prompt + continued]),
        max_output_tokens=max_output,
        stop_token_ids=frozenset(ids[prompt + continued :]),
        ignore_eos=ignore_eos,
        sampling=Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed),
    )
    return lane, request


def pack_abort(lane: Lane) -> bytes:
    """Makes an ABORT frame."""
    return _frame(Kind.ABORT, _ABORT.pack(lane))


def unpack_abort(body: bytes) -> Lane:
    """Reads an ABORT body."""
    lane: Lane = _ABORT.unpack(body)[0]
    return lane


def pack_step(counters: Counters, report: Report) -> bytes:
    """Makes a STEP frame."""
    parts = [
        _STEP.pack(
            counters.running,
            counters.waiting,
            counters.waiting_tokens,
            counters.kv_used_tokens,
            counters.taken,
            len(report.lanes) // 8,
            len(report.prefilled),
            len(report.ended),
        ),
        report.lanes,
        report.token_ids,
    ]
    if report.prefilled:
        parts.append(_column("q", [event.lane for event in report.prefilled]))
        parts.append(_column("i", [event.cached_tokens for event in report.prefilled]))
    if report.ended:
        ends = report.ended
        parts.append(_column("q", [end.lane for end in ends]))
        # -1 stands for no stop token.
        parts.append(
            _column("i", [-1 if end.stop_token_id is None else end.stop_token_id for end in ends])
        )
        parts.append(bytes(_REASON_CODES[end.reason] for end in ends))
        if any(end.message for end in ends):
            parts.append(json.dumps([end.message for end in ends]).encode())
    return _frame(Kind.STEP, b"".join(parts))


def unpack_step(body: bytes, batch: StepBatch) -> Counters:
    """Reads a STEP body and appends what happened to a batch."""
    running, waiting, waiting_tokens, kv_used, taken, rows, prefilled, ended = _STEP.unpack_from(
        body
    )
    columns = _Columns(body, _STEP.size)
    if rows:
        batch.lanes += columns.take("q", rows)
        batch.token_ids += columns.take("i", rows)
    if prefilled:
        lanes, cached = columns.take("q", prefilled), columns.take("i", prefilled)
        batch.prefilled += map(Prefilled, lanes, cached)
    if ended:
        lanes, stops = columns.take("q", ended), columns.take("i", ended)
        codes = columns.take("B", ended)
        messages = columns.take_messages(ended)
        for lane, stop, code, message in zip(lanes, stops, codes, messages, strict=True):
            batch.ended.append(Ended(lane, _REASONS[code], None if stop < 0 else stop, message))
    return Counters(
        running=running,
        waiting=waiting,
        waiting_tokens=waiting_tokens,
        kv_used_tokens=kv_used,
        taken=taken,
    )


class _Columns:
    """Reads columns one after the other."""

    def __init__(self, body: bytes, start: int) -> None:
        self._body = body
        self._start = start

    def take(self, code: str, count: int) -> tuple[int, ...]:
        column: tuple[int, ...] = struct.unpack_from(f"={count}{code}", self._body, self._start)
        self._start += struct.calcsize(f"={code}") * count
        return column

    def take_messages(self, count: int) -> list[str]:
        if self._start == len(self._body):
            return [""] * count
        messages: list[str] = json.loads(self._body[self._start :])
        return messages


def _column(code: str, values: Sequence[int]) -> bytes:
    return array.array(code, values).tobytes()


def _frame(kind: Kind, body: bytes) -> bytes:
    return _FRAME.pack(len(body), kind) + body
