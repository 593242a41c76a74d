"""What clients received beside what billing recorded. Pure: no gRPC, no clock.

A client that read the last frame has exactly one record with its counts. One that was cut, or left,
has been counted no less than it received and at most OVER_MAX more, whoever paid for it. Where the
end was ours, nothing was charged.

The bound is one for clients that read. While the network keeps a client from reading, or the client
itself or the network gets no time of the processor, tokens are made and counted: a stream that ends
in such a time, or in the moment after, may be over by what was made meanwhile, too, and has no part
in the share of all tokens, which is one of reading clients. Nothing else is excused: what piles up
behind a gateway or a worker that stands still is for the gateway to release in portions.
"""

from __future__ import annotations

import enum
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

OVER_MAX = 64
"""Tokens that a stream may be counted more than its reading client received."""
TOKENS_PER_S = 50
"""How fast a stream is made at most."""
OVER_SHARE_MAX = 0.002
"""The same over all that was charged."""
BURST_S = 1.0
"""How long after a halt what has piled up is being sent and read."""
SHARE_TOKENS_MIN = 50_000
"""A share of fewer tokens than these says nothing: one cut stream may be all of it."""


class Kind(enum.Enum):
    """What a client does."""

    STREAM = "stream"
    REPEAT = "repeat"
    UNARY = "unary"
    CANCEL = "cancel"
    DETACH = "detach"


class End(enum.Enum):
    """How it ended for the client."""

    CLEAN = "clean"
    LEFT = "left"
    CUT = "cut"
    REFUSED = "refused"


@dataclass(slots=True)
class Attempt:
    """One generation as its client saw it.

    Attributes:
        request_id: of the client.
        kind: what was tried.
        generation_id: empty when no frame came.
        received: output tokens.
        input_tokens: that the last frame named; 0 without one.
        charge_nanos: that the last frame named; 0 without one.
        end: how it ended.
        cause: why, for people.
        start_s: on the loop's clock.
        end_s: on the loop's clock.
        gateway: process that was asked.
        ended: time of day, to look it up in logs.
    """

    request_id: str
    kind: Kind
    generation_id: str = ""
    received: int = 0
    input_tokens: int = 0
    charge_nanos: int = 0
    end: End = End.CUT
    cause: str = ""
    start_s: float = 0.0
    end_s: float = 0.0
    gateway: str = ""
    ended: str = ""


@dataclass(frozen=True, slots=True)
class Halt:
    """A time in which tokens piled up.

    Attributes:
        start_s: on the loop's clock.
        end_s: on the loop's clock.
        gateway: process whose clients it met; empty when all.
        is_away: clients were kept from reading, which excuses; else the suite stood still.
    """

    start_s: float
    end_s: float
    gateway: str = ""
    is_away: bool = False

    def shared_s(self, attempt: Attempt) -> float:
        """Seconds of a generation's life in it; none once what had piled up was read."""
        if self.gateway not in {"", attempt.gateway} or attempt.end_s > self.end_s + BURST_S:
            return 0.0
        start_s, end_s = max(self.start_s, attempt.start_s), min(self.end_s, attempt.end_s)
        return max(0.0, end_s - start_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One usage record.

    Attributes:
        generation_id: what was settled.
        request_id: of the client.
        input_tokens: counted.
        output_tokens: counted.
        charge_nanos: taken.
        is_ours: the end was not the client's: nothing may be taken.
    """

    generation_id: str
    request_id: str
    input_tokens: int
    output_tokens: int
    charge_nanos: int
    is_ours: bool


@dataclass(slots=True)
class Audit:
    """The outcome.

    Attributes:
        ends: attempts by their end.
        halts: in which tokens piled up.
        interrupted: records whose clients did not see the end, or none at all.
        charged: of them, those that were charged.
        over: tokens charged and not received, of each interrupted stream of a reading client.
        halted_over: the same of those that ended in a halt of the suite; over has them too.
        away_over: the same of those whose clients were kept from reading; over has none of them.
        lost_answers: the same of unary calls: an answer is sent whole, or is lost whole.
        tokens: output tokens of all records that were charged.
        faults: what must not be.
    """

    ends: Counter[End] = field(default_factory=Counter)
    halts: Sequence[Halt] = ()
    interrupted: int = 0
    charged: int = 0
    over: list[int] = field(default_factory=list)
    halted_over: list[int] = field(default_factory=list)
    away_over: list[int] = field(default_factory=list)
    lost_answers: list[int] = field(default_factory=list)
    tokens: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def over_share(self) -> float:
        """Tokens of streams that were charged and not received, of all that were charged."""
        return sum(self.over) / self.tokens if self.tokens else 0.0


def audit(
    attempts: Sequence[Attempt], records: Iterable[Record], halts: Sequence[Halt] = ()
) -> Audit:
    """Compares what clients received with what was recorded.

    Args:
        attempts: of all clients.
        records: all that there are.
        halts: in which tokens piled up.
    """
    found = Audit(ends=Counter(attempt.end for attempt in attempts), halts=halts)
    by_generation: dict[str, list[Record]] = defaultdict(list)
    by_request: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_generation[record.generation_id].append(record)
        by_request[record.request_id].append(record)
        _check_record(record, found)
    # A client that repeats its request has of a generation what the best of its calls has.
    best: dict[str, Attempt] = {}
    for attempt in sorted(attempts, key=lambda item: item.received):
        best[attempt.generation_id] = attempt
    _check_requests({attempt.request_id for attempt in attempts}, by_request, found)
    for attempt in attempts:
        if attempt.generation_id:
            _check_attempt(attempt, by_generation, best, found)
    _check_unheard(attempts, by_request, best, found)
    if not found.ends[End.CLEAN]:
        found.faults.append("nobody has read a generation to its end: there was nothing to lose")
    if found.tokens >= SHARE_TOKENS_MIN and found.over_share > OVER_SHARE_MAX:
        found.faults.append(f"{found.over_share:.3%} of all tokens were charged and not received")
    return found


def _check_record(record: Record, found: Audit) -> None:
    if record.is_ours and record.charge_nanos:
        found.faults.append(f"{record.generation_id} was charged though its end was ours")
    if record.charge_nanos:
        found.tokens += record.output_tokens


def _check_requests(
    requests: AbstractSet[str], by_request: Mapping[str, Sequence[Record]], found: Audit
) -> None:
    for request_id, records in by_request.items():
        if sum(record.charge_nanos > 0 for record in records) > 1:
            found.faults.append(f"request {request_id} was charged more than once")
        if request_id not in requests:
            found.faults.append(f"request {request_id} has a record and was never made")


def _check_unheard(
    attempts: Sequence[Attempt],
    by_request: Mapping[str, Sequence[Record]],
    best: Mapping[str, Attempt],
    found: Audit,
) -> None:
    """What may have been made of a request without its client's knowing, billing knows."""
    unheard: dict[str, list[Attempt]] = {attempt.request_id: [] for attempt in attempts}
    for attempt in attempts:
        if not attempt.generation_id:
            unheard[attempt.request_id].append(attempt)
    for request_id, calls in unheard.items():
        records = by_request.get(request_id, [])
        unknown = [record for record in records if record.generation_id not in best]
        if len(unknown) > len(calls):
            found.faults.append(
                f"request {request_id} has {len(unknown)} records that its client never heard of"
                f" and {len(calls)} calls without an answer"
            )
        for record in unknown if calls else ():
            _check_interrupted(calls[-1], record, found)


def _check_attempt(
    attempt: Attempt,
    by_generation: Mapping[str, list[Record]],
    best: Mapping[str, Attempt],
    found: Audit,
) -> None:
    records = by_generation.get(attempt.generation_id, [])
    if len(records) != 1:
        found.faults.append(f"{attempt.generation_id} has {len(records)} usage records, not one")
    elif attempt.end is End.CLEAN:
        _check_clean(attempt, records[0], found)
    elif attempt is best[attempt.generation_id]:
        _check_interrupted(attempt, records[0], found)


def _check_clean(attempt: Attempt, record: Record, found: Audit) -> None:
    received = (attempt.input_tokens, attempt.received, attempt.charge_nanos)
    recorded = (record.input_tokens, record.output_tokens, record.charge_nanos)
    if received != recorded:
        found.faults.append(
            f"{attempt.generation_id} ended cleanly with input, output and charge {received}, its"
            f" record has {recorded}"
        )


def _check_interrupted(attempt: Attempt, record: Record, found: Audit) -> None:
    over = record.output_tokens - attempt.received
    found.interrupted += 1
    found.charged += record.charge_nanos > 0
    # Who has detached is not reading: all that is made is released to the log, and counted.
    is_reading = attempt.kind is not Kind.DETACH
    met = [halt for halt in found.halts if halt.shared_s(attempt)]
    away_s = sum(halt.shared_s(attempt) for halt in met if halt.is_away)
    over_max = OVER_MAX + math.ceil(TOKENS_PER_S * away_s)
    if over < 0 or (is_reading and over > over_max):
        found.faults.append(
            f"{record.generation_id} ({attempt.kind.value}, {attempt.end.value}: {attempt.cause}"
            f" {attempt.ended})"
            f" counts {record.output_tokens} tokens, its client received {attempt.received}"
            f" and may have missed {over_max}"
        )
    if not is_reading or not record.charge_nanos:
        return
    if attempt.kind is Kind.UNARY:
        found.lost_answers.append(over)
    elif any(halt.is_away for halt in met):
        found.away_over.append(over)
    else:
        found.over.append(over)
        if met:
            found.halted_over.append(over)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of all values does not exceed; 0 of none."""
    if not values:
        return 0.0
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
