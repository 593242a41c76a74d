"""Frames between a ChildEngine and its child process, over one stream socket.

    frame    = length of body: uint32 | kind: uint8 | body
    SUBMIT   = fixed fields | prompt ids | continue ids | stop ids (int32 columns) | cache salt |
               what few requests ask for, JSON, mostly empty
    STEP     = fixed fields | lanes int64, ids int32 of the rows | lanes int64, cached int32 of the
               prefilled | lanes int64, stop ids int32, reasons uint8 of the ended |
               score blocks of rows | lane int64, offset uint32, score block of each prompt part |
               messages JSON
    block    = rows, alternatives: uint32 | row int32, log-probability float32 of each row |
               ids int32, log-probabilities float32 of all alternatives
    KV       = kind uint8, tier uint8, parent? uint8, hashes uint32 | parent uint64 | hashes uint64
               of each event
    EMBED    = job: uint32, inputs: uint32 | lengths | ids                     (int32 columns)
    EMBEDDED = job: uint32, rows: uint32, columns: uint32 | float32, or why not, UTF-8

Both ends run on one machine: byte order is native. They should be from one checkout, and the
version in START says whether they are. Nothing here is able to run code from the other side, unlike
pickle.

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

import numpy as np
import numpy.typing as npt

from services.worker.engine.base import (
    Ended,
    EndReason,
    EngineRequest,
    Lane,
    Prefilled,
    PromptScores,
    Sampling,
    StepBatch,
)
from services.worker.engine.score_blocks import ScoreBlock, extend_scores, to_scores
from services.worker.engine.wire_extras import read_extras, write_extras

VERSION: Final = 3
"""Of all that is said here; changed with it."""

Value = str | int | float | bool | None
"""What the rare control messages carry, flat."""


class Kind(enum.IntEnum):
    """Kinds of frames."""

    START = 1  # to the child: settings, JSON
    SUBMIT = 2  # to the child
    ABORT = 3  # to the child
    READY = 4  # to the parent: base.EngineInfo, JSON
    REFUSED = 5  # to the parent: why the child cannot start, JSON
    STEP = 6  # to the parent
    LOAD_ADAPTER = 7  # to the child, JSON
    ADAPTER_ANSWER = 8  # to the parent, JSON
    EMBED = 9  # to the child
    EMBEDDED = 10  # to the parent
    DROP_EMBED = 11  # to the child
    RESIDENTS = 12  # to the parent: names of the loaded adapters, one a line
    PROGRESS = 13  # to the parent: base.LoadProgress, JSON
    KV = 14  # to the parent: changes of the prefix cache


@dataclass(slots=True, kw_only=True)
class Counters:
    """The load as the child saw it at the end of a step; the fields of base.EngineLoad.

    Attributes:
        running: lanes that hold a slot; None when that is not known, as in the next three.
        waiting: lanes that wait for a slot.
        waiting_tokens: prompt tokens not yet in the KV cache, of running and waiting lanes.
        kv_used_tokens: tokens in the KV cache.
        taken: submits read since the last report; the parent counts the others as waiting.
    """

    running: int | None = 0
    waiting: int | None = 0
    waiting_tokens: int | None = 0
    kv_used_tokens: int | None = 0
    taken: int = 0


@dataclass(slots=True)
class Report:
    """What one step of the child did, rows by column.

    Attributes:
        lanes: int64 column, native bytes.
        token_ids: int32 column, native bytes; as many as lanes.
        prefilled: as in base.StepBatch.
        ended: as in base.StepBatch.
        scores: of the rows that asked.
        prompt_scores: lane, place in the prompt of the first row, and all rows of each part.
    """

    lanes: bytes = b""
    token_ids: bytes = b""
    prefilled: list[Prefilled] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    scores: list[ScoreBlock] = field(default_factory=list)
    prompt_scores: list[tuple[Lane, int, ScoreBlock]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell but counters."""
        return not (self.lanes or self.prefilled or self.ended or self.prompt_scores)

    @property
    def row_count(self) -> int:
        """Rows so far."""
        return len(self.token_ids) // 4


_FRAME: Final = struct.Struct("=IB")
_ABORT: Final = struct.Struct("=q")
_SUBMIT: Final = struct.Struct("=qQddiIIIIBIi")
_IGNORES_EOS: Final = 1
_READS_CACHE: Final = 2
_IS_BACKGROUND: Final = 4
_STEP: Final = struct.Struct("=iiqqIIIIII")
_UNKNOWN: Final = -1
_BLOCK: Final = struct.Struct("=II")
_PART: Final = struct.Struct("=qI")
_EMBED: Final = struct.Struct("=II")
_DROP_EMBED: Final = struct.Struct("=I")
_EMBEDDED: Final = struct.Struct("=III")
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
    """Makes a frame of flat JSON."""
    return frame(kind, json.dumps(values).encode())


def unpack_control(body: bytes) -> dict[str, Value]:
    """Reads a body of flat JSON."""
    values: dict[str, Value] = json.loads(body)
    return values


def pack_submit(lane: Lane, request: EngineRequest) -> bytes:
    """Makes a SUBMIT frame. Numbers beyond their column are cut to what means the same.

    Raises:
        OverflowError: a token id has no 32 bits, so it is in no vocabulary.
    """
    sampling = request.sampling
    extras = write_extras(request)
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
        request.ignore_eos * _IGNORES_EOS
        | request.reads_cache * _READS_CACHE
        | request.is_background * _IS_BACKGROUND,
        len(request.cache_salt),
        -1 if request.top_logprobs is None else request.top_logprobs,
    )
    ids = array.array("i", request.prompt_ids)
    ids.extend(request.continue_ids)
    ids.extend(sorted(request.stop_token_ids))
    return frame(Kind.SUBMIT, fixed + ids.tobytes() + request.cache_salt + extras)


def unpack_submit(body: bytes) -> tuple[Lane, EngineRequest]:
    """Reads a SUBMIT body.

    Raises:
        ValueError: its columns do not fit its counts.
    """
    fixed = _SUBMIT.unpack_from(body)
    lane, seed, temperature, top_p, top_k, max_output, prompt, continued, stops = fixed[:9]
    flags, salt, top_logprobs = fixed[9:]
    ids_end = _SUBMIT.size + 4 * (prompt + continued + stops)
    if len(body) < ids_end + salt:
        raise ValueError("the columns of a submit frame do not fit its counts")
    ids = array.array("i", body[_SUBMIT.size : ids_end])
    request = EngineRequest(
        prompt_ids=tuple(ids[:prompt]),
        continue_ids=tuple(ids[prompt : prompt + continued]),
        max_output_tokens=max_output,
        stop_token_ids=frozenset(ids[prompt + continued :]),
        ignore_eos=bool(flags & _IGNORES_EOS),
        sampling=Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed),
        top_logprobs=None if top_logprobs < 0 else top_logprobs,
        cache_salt=body[ids_end : ids_end + salt],
        reads_cache=bool(flags & _READS_CACHE),
        is_background=bool(flags & _IS_BACKGROUND),
    )
    return lane, read_extras(request, body[ids_end + salt :])


def pack_abort(lane: Lane) -> bytes:
    """Makes an ABORT frame."""
    return frame(Kind.ABORT, _ABORT.pack(lane))


def unpack_abort(body: bytes) -> Lane:
    """Reads an ABORT body."""
    lane: Lane = _ABORT.unpack(body)[0]
    return lane


def pack_step(counters: Counters, report: Report) -> bytes:
    """Makes a STEP frame."""
    parts = [
        _STEP.pack(
            _or_unknown(counters.running),
            _or_unknown(counters.waiting),
            _or_unknown(counters.waiting_tokens),
            _or_unknown(counters.kv_used_tokens),
            counters.taken,
            len(report.lanes) // 8,
            len(report.prefilled),
            len(report.ended),
            len(report.scores),
            len(report.prompt_scores),
        ),
        report.lanes,
        report.token_ids,
    ]
    if report.prefilled:
        parts.append(column("q", [event.lane for event in report.prefilled]))
        parts.append(column("i", [event.cached_tokens for event in report.prefilled]))
    if report.ended:
        ends = report.ended
        parts.append(column("q", [end.lane for end in ends]))
        # -1 stands for no stop token.
        parts.append(
            column("i", [-1 if end.stop_token_id is None else end.stop_token_id for end in ends])
        )
        parts.append(bytes(_REASON_CODES[end.reason] for end in ends))
    for block in report.scores:
        parts += _pack_block(block)
    for lane, offset, block in report.prompt_scores:
        parts += (_PART.pack(lane, offset), *_pack_block(block))
    if any(end.message for end in report.ended):
        parts.append(json.dumps([end.message for end in report.ended]).encode())
    return frame(Kind.STEP, b"".join(parts))


def unpack_step(body: bytes, batch: StepBatch) -> Counters:
    """Reads a STEP body and appends what happened to a batch."""
    fixed = _STEP.unpack_from(body)
    running, waiting, waiting_tokens, kv_used, taken = fixed[:5]
    rows, prefilled, ended, blocks, parts = fixed[5:]
    columns = Columns(body, _STEP.size)
    rows_before = len(batch.lanes)
    if rows:
        batch.lanes += columns.take("q", rows)
        batch.token_ids += columns.take("i", rows)
    if prefilled:
        lanes, cached = columns.take("q", prefilled), columns.take("i", prefilled)
        batch.prefilled += map(Prefilled, lanes, cached)
    ends: list[tuple[int, int, int]] = []
    if ended:
        lanes, stops = columns.take("q", ended), columns.take("i", ended)
        ends += zip(lanes, stops, columns.take("B", ended), strict=True)
    # Blocks come without rows, too: where all that were scored are ends, which are not shown.
    scored = [columns.take_block() for _ in range(blocks)]
    if rows and (scored or batch.scores is not None):
        batch.scores = extend_scores(batch.scores, rows_before, rows, scored)
    for _ in range(parts):
        lane, offset = columns.take_fixed(_PART)
        batch.prompt_scores.append(PromptScores(lane, offset, to_scores(columns.take_block())))
    if ended:
        for (lane, stop, code), message in zip(ends, columns.take_messages(ended), strict=True):
            batch.ended.append(Ended(lane, _REASONS[code], None if stop < 0 else stop, message))
    return Counters(
        running=_or_none(running),
        waiting=_or_none(waiting),
        waiting_tokens=_or_none(waiting_tokens),
        kv_used_tokens=_or_none(kv_used),
        taken=taken,
    )


def pack_embed(job: int, inputs: Sequence[Sequence[int]]) -> bytes:
    """Makes an EMBED frame.

    Raises:
        OverflowError: a token id has no 32 bits, so it is in no vocabulary.
    """
    columns = array.array("i", [len(ids) for ids in inputs])
    for ids in inputs:
        columns.extend(ids)
    return frame(Kind.EMBED, _EMBED.pack(job, len(inputs)) + columns.tobytes())


def unpack_embed(body: bytes) -> tuple[int, list[tuple[int, ...]]]:
    """Reads an EMBED body."""
    columns = Columns(body, _EMBED.size)
    job, count = _EMBED.unpack_from(body)
    return job, [columns.take("i", length) for length in columns.take("i", count)]


def pack_drop_embed(job: int) -> bytes:
    """Makes a DROP_EMBED frame."""
    return frame(Kind.DROP_EMBED, _DROP_EMBED.pack(job))


def unpack_drop_embed(body: bytes) -> int:
    """Reads a DROP_EMBED body."""
    job: int = _DROP_EMBED.unpack(body)[0]
    return job


def pack_embedded(job: int, outcome: npt.NDArray[np.float32] | str) -> bytes:
    """Makes an EMBEDDED frame: vectors, shape (inputs, dimensions), or why there are none."""
    if isinstance(outcome, str):
        return frame(Kind.EMBEDDED, _EMBEDDED.pack(job, 0, 0) + outcome.encode())
    return frame(Kind.EMBEDDED, _EMBEDDED.pack(job, *outcome.shape) + outcome.tobytes())


def unpack_embedded(body: bytes) -> tuple[int, npt.NDArray[np.float32] | str]:
    """Reads an EMBEDDED body."""
    job, rows, columns = _EMBEDDED.unpack_from(body)
    rest = body[_EMBEDDED.size :]
    if not rows:
        return job, rest.decode()
    return job, np.frombuffer(rest, np.float32).reshape(rows, columns).copy()


def pack_residents(names: Sequence[str]) -> bytes:
    """Makes a RESIDENTS frame."""
    return frame(Kind.RESIDENTS, "\n".join(names).encode())


def unpack_residents(body: bytes) -> tuple[str, ...]:
    """Reads a RESIDENTS body."""
    return tuple(body.decode().split("\n")) if body else ()


class Columns:
    """Reads columns one after the other."""

    def __init__(self, body: bytes, start: int) -> None:
        self._body = body
        self._start = start

    @property
    def is_over(self) -> bool:
        """Whether nothing is left."""
        return self._start >= len(self._body)

    def take(self, code: str, count: int) -> tuple[int, ...]:
        """Numbers of one type, as `struct` names it."""
        column: tuple[int, ...] = struct.unpack_from(f"={count}{code}", self._body, self._start)
        self._start += struct.calcsize(f"={code}") * count
        return column

    def take_fixed(self, layout: struct.Struct) -> tuple[int, ...]:
        """Numbers of several types."""
        values: tuple[int, ...] = layout.unpack_from(self._body, self._start)
        self._start += layout.size
        return values

    def take_block(self) -> ScoreBlock:
        """Scores of some rows."""
        count, width = self.take_fixed(_BLOCK)
        return ScoreBlock(
            np.frombuffer(self._bytes(4 * count), np.int32),
            np.frombuffer(self._bytes(4 * count), np.float32),
            np.frombuffer(self._bytes(4 * count * width), np.int32).reshape(count, width),
            np.frombuffer(self._bytes(4 * count * width), np.float32).reshape(count, width),
        )

    def _bytes(self, count: int) -> bytes:
        self._start += count
        return self._body[self._start - count : self._start]

    def take_messages(self, count: int) -> list[str]:
        """The messages of ends, which stand last; empty texts where there are none."""
        if self._start == len(self._body):
            return [""] * count
        messages: list[str] = json.loads(self._body[self._start :])
        return messages


def _or_unknown(number: int | None) -> int:
    return _UNKNOWN if number is None else number


def _or_none(number: int) -> int | None:
    return None if number == _UNKNOWN else number


def _pack_block(block: ScoreBlock) -> tuple[bytes, ...]:
    return (
        _BLOCK.pack(len(block.rows), block.top_count),
        block.rows.tobytes(),
        block.logprobs.tobytes(),
        block.top_token_ids.tobytes(),
        block.top_logprobs.tobytes(),
    )


def column(code: str, values: Sequence[int]) -> bytes:
    """Packs numbers of one type, as `array` names it."""
    return array.array(code, values).tobytes()


def frame(kind: Kind, body: bytes) -> bytes:
    """Makes a frame."""
    return _FRAME.pack(len(body), kind) + body
