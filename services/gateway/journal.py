"""The usage journal: counts of what is released, written before it is released.

Append-only segments in one folder, one writer. A plain write survives the death of the process
(only the death of the machine can lose the last of it), so after any kill the next process finds
every accepted generation with at least the count that its client has seen, and every slice that
was asked for. It never holds a prompt or an output.

A record is  u32 length | u32 CRC-32 of the body | body,  little-endian. A body is one byte of kind
and then JSON, except progress, which is on the token path:  'P' u32 ordinal u32 output_tokens.

    S slice_id holder           before the slice is asked for
    O ordinal opening           a worker has accepted; before the first frame
    H ordinal cached_tokens     before the first frame of output, when the prefix cache had some
    P ordinal output_tokens     before each frame
    C ordinal closing           the end
    A ordinals                  settled: the money is durable
    Z slice_ids                 closed: nothing is held any more

Segments are named <run>-<number>: ordinals count from 1 in each run, that is in each process. A
segment takes records until it is larger than SEGMENT_BYTES_MAX; it is deleted when everything that
was opened in it, and in those before it, is settled and closed. What is torn at the end of a
segment was never released. A segment that is damaged in its middle is read around the damage, and
kept as <run>-<number>.damaged for whoever looks into it.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import json
import os
import struct
import zlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import structlog

from libs import failpoints
from libs.errors import unavailable
from services.gateway.domain import Closing, EndCause, Opening
from services.gateway.segments import HEADER, read_segment

log = structlog.get_logger(__name__)

SEGMENT_BYTES_MAX = 16 * 1024 * 1024
_PROGRESS = struct.Struct("<cII")
_SUFFIX = ".journal"
_DAMAGED_SUFFIX = ".damaged"
# Made once: json.dumps with separators makes an encoder each time.
_ENCODE = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(slots=True)
class Recovered:
    """What an earlier process left behind.

    Attributes:
        settlements: generations whose settlement is not known to be durable.
        slice_ids: slices that may still be held.
        paths: segments to delete once both are dealt with.
        damaged: those of them that are kept: something in them could not be read.
    """

    settlements: list[tuple[Opening, Closing]] = field(default_factory=list)
    slice_ids: list[str] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    damaged: set[Path] = field(default_factory=set)


class JournalBusy(Exception):
    """Another process writes to this folder."""


class Journal:
    """Writer of one process. Not for use from several threads.

    Raises:
        JournalBusy: another gateway uses the folder.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._lock = _lock(folder)
        self._earlier = sorted(folder.glob(f"*{_SUFFIX}"))
        # Copies that somebody made of them have names of their own.
        used = [*self._earlier, *folder.glob(f"{8 * '[0-9]'}-*{_DAMAGED_SUFFIX}")]
        self._run = 1 + max((_run_of(path) for path in used), default=0)
        self._ordinal = 0
        self._number = 0
        self._open_generations: dict[int, int] = {}
        self._open_slices: dict[str, None] = {}
        self._live_by_segment: dict[int, int] = {}
        self._descriptor = -1
        self._size = 0
        self._next_segment()

    def recover(self, end_time: datetime) -> Recovered:
        """Reads what earlier processes left. Generations without an end were cut by their death.

        Args:
            end_time: recorded as the end of those.
        """
        recovered = _recover(self._earlier, end_time)
        failpoints.hit(failpoints.Point.REPLAY_READ)
        return recovered

    def forget(self, recovered: Recovered) -> None:
        """Deletes what was recovered, once billing has all of it; what is damaged is set aside."""
        failpoints.hit(failpoints.Point.REPLAY_SETTLED)
        for path in recovered.paths:
            if path in recovered.damaged:
                path.rename(path.with_suffix(_DAMAGED_SUFFIX))
            else:
                path.unlink(missing_ok=True)

    def slice_wanted(self, slice_id: str) -> None:
        """Notes a slice before it is asked for.

        Raises:
            Unavailable: the journal cannot be written; the slice must not be asked for.
        """
        self._write_json(b"S", slice_id)
        self._open_slices[slice_id] = None
        failpoints.hit(failpoints.Point.SLICE_NOTED)

    def slices_closed(self, slice_ids: list[str]) -> None:
        """Notes that nothing is held by these any more.

        Raises:
            Unavailable: the journal cannot be written; after a crash they are closed once more.
        """
        failpoints.hit(failpoints.Point.SLICES_CLOSED)
        for slice_id in slice_ids:
            self._open_slices.pop(slice_id, None)
        self._write_json(b"Z", slice_ids)

    def opened(self, opening: Opening) -> int:
        """Notes an accepted generation; returns its ordinal for later records.

        Raises:
            Unavailable: the journal cannot be written; nothing may be released.
        """
        self._ordinal += 1
        self._write_json(b"O", [self._ordinal, _opening_to_json(opening)])
        self._open_generations[self._ordinal] = self._number
        self._live_by_segment[self._number] += 1
        failpoints.hit(failpoints.Point.JOURNAL_OPENED)
        return self._ordinal

    def progress(self, counts: list[tuple[int, int]]) -> None:
        """Notes counts that are about to be released, all in one write. On the token path.

        Args:
            counts: ordinal and output tokens of each generation.

        Raises:
            Unavailable: the journal cannot be written; nothing of it may be released.
        """
        records = bytearray()
        for ordinal, output_tokens in counts:
            body = _PROGRESS.pack(b"P", ordinal, output_tokens)
            records += HEADER.pack(_PROGRESS.size, zlib.crc32(body))
            records += body
        self._write(records)

    def prefilled(self, counts: list[tuple[int, int]]) -> None:
        """Notes how much of prompts the prefix cache had, before their first output is released.

        Args:
            counts: ordinal and cached input tokens of each generation.

        Raises:
            Unavailable: the journal cannot be written; nothing of it may be released.
        """
        self._write(b"".join(_json_record(b"H", count) for count in counts))

    def closed(self, ordinal: int, closing: Closing) -> None:
        """Notes the end of a generation.

        Raises:
            Unavailable: the journal cannot be written; after a crash the last count stands.
        """
        self._write_json(b"C", [ordinal, _closing_to_json(closing)])
        failpoints.hit(failpoints.Point.JOURNAL_CLOSED)

    def settled(self, ordinals: list[int]) -> None:
        """Notes that the money of these is durable.

        Raises:
            Unavailable: the journal cannot be written; nothing has changed.
        """
        self._write_json(b"A", ordinals)
        for ordinal in ordinals:
            number = self._open_generations.pop(ordinal, None)
            if number is not None:
                self._live_by_segment[number] -= 1
        self._delete_finished()

    def close(self) -> None:
        """Ends writing. A segment with nothing open in it is deleted."""
        if not self._open_generations and not self._open_slices:
            self._path(self._number).unlink(missing_ok=True)
        os.close(self._descriptor)
        os.close(self._lock)

    def _path(self, number: int) -> Path:
        return self._folder / f"{self._run:08d}-{number:08d}{_SUFFIX}"

    def _next_segment(self) -> None:
        """Goes on in a new file, which is open and has its head before the old one is closed.

        Raises:
            OSError: there is no new file; all goes on in the old one.
        """
        number = self._number + 1
        descriptor = self._begin(self._path(number))
        earlier, self._descriptor = self._descriptor, descriptor
        self._number = number
        self._size = 0
        self._live_by_segment[number] = 0
        if earlier >= 0:
            os.close(earlier)

    def _begin(self, path: Path) -> int:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        # Slices may live for hours; naming them again frees the segments behind.
        head = b"".join(_json_record(b"S", slice_id) for slice_id in self._open_slices)
        try:
            _write_all(descriptor, head)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        return descriptor

    def _delete_finished(self) -> None:
        for number in sorted(self._live_by_segment):
            if number == self._number or self._live_by_segment[number]:
                return
            del self._live_by_segment[number]
            self._path(number).unlink(missing_ok=True)

    def _write_json(self, kind: bytes, value: object) -> None:
        self._write(_json_record(kind, value))

    def _write(self, record: bytes | bytearray) -> None:
        try:
            if self._size > SEGMENT_BYTES_MAX:
                self._next_segment()
            written = os.write(self._descriptor, record)
        except OSError as error:
            log.exception("journal failed")
            raise unavailable("journal") from error
        self._size += written
        if written != len(record):
            # The torn record ends this segment for every reader: the next record needs a new one.
            self._size = SEGMENT_BYTES_MAX + 1
            log.error("journal record cut", written=written, size=len(record))
            raise unavailable("journal")


def _write_all(descriptor: int, data: bytes) -> None:
    if os.write(descriptor, data) != len(data):
        raise OSError(errno.ENOSPC, "the head of a segment was cut")


def _json_record(kind: bytes, value: object) -> bytes:
    body = kind + _ENCODE(value).encode("utf-8")
    return HEADER.pack(len(body), zlib.crc32(body)) + body


def _lock(folder: Path) -> int:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise JournalBusy(f"{folder} is used by another gateway") from error
    return descriptor


def _run_of(path: Path) -> int:
    return int(path.stem.partition("-")[0])


def _recover(paths: list[Path], end_time: datetime) -> Recovered:
    replay = _Replay()
    damaged = set()
    for path in paths:
        segment = read_segment(path)
        is_known = [replay.apply(_run_of(path), body) for body in segment.bodies]
        if segment.damaged_bytes or not all(is_known):
            damaged.add(path)
    return Recovered(
        settlements=replay.settlements(end_time),
        slice_ids=list(replay.slices),
        paths=list(paths),
        damaged=damaged,
    )


class _Replay:
    """State of the journal after the records so far. Keys are (run, ordinal)."""

    def __init__(self) -> None:
        self.slices: dict[str, None] = {}
        self._openings: dict[tuple[int, int], Opening] = {}
        self._released: dict[tuple[int, int], int] = {}
        self._cached: dict[tuple[int, int], int] = {}
        self._closings: dict[tuple[int, int], Closing] = {}

    def apply(self, run: int, body: bytes) -> bool:
        """Takes the next record; False when it is of a kind that is not known here."""
        kind = body[:1]
        if kind == b"P":
            _, ordinal, count = _PROGRESS.unpack(body)
            self._released[run, ordinal] = count
            return True
        value = json.loads(body[1:])
        match kind:
            case b"O":
                self._openings[run, value[0]] = _opening_from_json(value[1])
            case b"C":
                self._closings[run, value[0]] = _closing_from_json(value[1])
            case b"H":
                self._cached[run, value[0]] = value[1]
            case b"A":
                for ordinal in value:
                    self._openings.pop((run, ordinal), None)
            case b"S":
                self.slices[value] = None
            case b"Z":
                for slice_id in value:
                    self.slices.pop(slice_id, None)
            case _:
                log.error("journal has a record of unknown kind", kind=kind.hex())
                return False
        return True

    def settlements(self, end_time: datetime) -> list[tuple[Opening, Closing]]:
        return [
            (opening, self._closings.get(key) or self._cut(key, end_time))
            for key, opening in self._openings.items()
        ]

    def _cut(self, key: tuple[int, int], end_time: datetime) -> Closing:
        return Closing(
            output_tokens=self._released.get(key, 0),
            cause=EndCause.GATEWAY_LOST,
            end_time=end_time,
            cached_input_tokens=self._cached.get(key, 0),
        )


def _opening_to_json(opening: Opening) -> dict[str, object]:
    return {
        "generation_id": opening.generation_id,
        "slice_id": opening.slice_id,
        "account": opening.account,
        "project": opening.project,
        "api_key": opening.api_key,
        "offering": opening.offering,
        "model_version": opening.model_version,
        "price": opening.price,
        "input_tokens": opening.input_tokens,
        "start_time": opening.start_time.timestamp(),
        "request_id": opening.request_id,
        "request_sha256": opening.request_sha256,
        "labels": dict(opening.labels),
        "end_user": opening.end_user,
        "background": opening.background,
    }


def _opening_from_json(value: dict[str, object]) -> Opening:
    return Opening(
        generation_id=str(value["generation_id"]),
        slice_id=str(value["slice_id"]),
        account=str(value["account"]),
        project=str(value["project"]),
        api_key=str(value["api_key"]),
        offering=str(value["offering"]),
        model_version=str(value["model_version"]),
        price=str(value["price"]),
        input_tokens=int(str(value["input_tokens"])),
        start_time=datetime.fromtimestamp(float(str(value["start_time"])), UTC),
        # Absent in what earlier versions wrote.
        request_id=str(value.get("request_id", "")),
        request_sha256=str(value.get("request_sha256", "")),
        labels=_labels_from_json(value.get("labels")),
        end_user=str(value.get("end_user", "")),
        background=bool(value.get("background", False)),
    )


def _labels_from_json(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        return {}
    return {str(key): str(label) for key, label in value.items()}


def _closing_to_json(closing: Closing) -> dict[str, object]:
    return {
        "output_tokens": closing.output_tokens,
        "cause": closing.cause.name,
        "end_time": closing.end_time.timestamp(),
        "cached_input_tokens": closing.cached_input_tokens,
        "reasoning_tokens": closing.reasoning_tokens,
        "engine_time_ns": closing.engine_time_ns,
        "receipt": base64.b64encode(closing.receipt).decode("ascii"),
    }


def _closing_from_json(value: dict[str, object]) -> Closing:
    return Closing(
        output_tokens=int(str(value["output_tokens"])),
        cause=EndCause[str(value["cause"])],
        end_time=datetime.fromtimestamp(float(str(value["end_time"])), UTC),
        # Absent in what earlier versions wrote.
        cached_input_tokens=int(str(value.get("cached_input_tokens", 0))),
        reasoning_tokens=int(str(value.get("reasoning_tokens", 0))),
        engine_time_ns=int(str(value.get("engine_time_ns", 0))),
        receipt=base64.b64decode(str(value.get("receipt", ""))),
    )
