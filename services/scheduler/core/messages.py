"""What goes into the core and what comes out of it: values only.

Inputs are facts that have happened; commands are what the loop has to tell somebody. Times are
seconds of one monotonic clock, durations seconds. Workers, model versions and projects go by their
resource names ("workers/a"), which the core only compares.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class WorkerState(enum.Enum):
    """Whether a worker takes work."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


class Priority(enum.IntEnum):
    """Who goes first in a queue: the lower number. Numbers, which are found quickly in a table."""

    STANDARD = 0
    BACKGROUND = 1


PRIORITIES = tuple(Priority)


class Refusal(enum.Enum):
    """Why a request got no slot."""

    NO_READY_WORKER = "no ready worker"
    QUEUE_FULL = "queue full"
    QUEUE_TIMEOUT = "queue timeout"


class StreamEnd(enum.Enum):
    """Why the scheduler ends the stream of a worker."""

    REPLACED = "replaced"
    LEASE_OVER = "lease over"
    OLDER_SERVES = "older serves"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a worker is; fixed once it has loaded its model. Fields as in maas.engine.v1.

    Attributes:
        capabilities: the worker's message, serialized: passed on and never looked into; None when
            it said none.
    """

    engine: str
    engine_version: str
    model_versions: tuple[str, ...]
    context_length: int
    max_running: int
    max_waiting: int
    vocabulary_size: int
    digest: str
    kv_block_tokens: int = 0
    capabilities: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Load of a worker at one moment; None was not measured. Fields as in maas.engine.v1."""

    running: int | None = None
    waiting: int | None = None
    waiting_tokens: int | None = None
    kv_used_tokens: int | None = None
    kv_total_tokens: int | None = None
    resident_adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """What a worker says when it connects.

    Attributes:
        worker: name, stable over restarts.
        incarnation: random per process.
        endpoint: "host:port" of its EngineService.
        info: what it is; what is known before, of a worker that is loading.
        running: executions that run on it.
        loading: how far it is with loading its model: the worker's message, serialized, passed on
            and never looked into; None when it is loaded.
    """

    worker: str
    incarnation: str
    endpoint: str
    info: EngineInfo
    running: tuple[str, ...] = ()
    loading: bytes | None = None


# Inputs.


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotAsked:
    """A request wants a slot.

    Attributes:
        execution_id: repeating it returns the slot already given.
        model_version: what the worker has to serve.
        project: who asks; projects take turns.
        excluded: workers that have just failed this request.
        max_wait_s: longest wait in the queue; 0 or less does not wait.
        places: places that it takes on one worker, all at once; at least 1.
        affinity: requests with equal bytes prefer the same worker; empty for no preference.
        priority: its class.
        spare_execution_ids: executions that may come soon; the first of them get spare slots where
            there is ample room.
    """

    execution_id: str
    model_version: str
    project: str = ""
    excluded: frozenset[str] = frozenset()
    max_wait_s: float
    places: int = 1
    affinity: bytes = b""
    priority: Priority = Priority.STANDARD
    spare_execution_ids: tuple[str, ...] = ()

    @property
    def is_ahead(self) -> bool:
        """Whether nobody stands behind it yet, so that its own slot is a spare like the others.

        Spares have one place: who asks for more means it.
        """
        return self.max_wait_s <= 0 and bool(self.spare_execution_ids) and self.places == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CallerGone:
    """Nobody waits for the answer to this request any more."""

    execution_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotsReleased:
    """Slots are given back. Unknown ids are ignored."""

    slot_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRegistered:
    """A worker has connected and got this epoch, which is above all before it under its name."""

    registration: Registration
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHeard:
    """A sign of life. Any message of a worker is one; those that say more are subclasses.

    Attributes:
        worker: its name.
        epoch: of the stream that it came on; of an older one it is ignored.
    """

    worker: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReported(WorkerHeard):
    """A worker has measured its load."""

    load: Load


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionsReported(WorkerHeard):
    """Executions have started and ended; one that is in both has done so in that order."""

    started: tuple[str, ...] = ()
    ended: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingReported(WorkerHeard):
    """A worker is so far with loading its model; as in Registration."""

    loading: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(WorkerHeard):
    """A worker has loaded its model and takes work. Said once, by one that registered loading."""

    info: EngineInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainAsked(WorkerHeard):
    """The worker finishes what runs and takes nothing new."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamBroken(WorkerHeard):
    """The worker's stream is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed."""


Input = SlotAsked | CallerGone | SlotsReleased | WorkerRegistered | WorkerHeard | Tick


# Commands.


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A worker to run on."""

    worker: str
    endpoint: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spare:
    """A slot for an execution that may come.

    Attributes:
        execution_id: whose it would be.
        slot_id: made here.
        target: where to run.
    """

    execution_id: str
    slot_id: str
    target: Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Tell whoever asked that the slot is theirs.

    Attributes:
        execution_id: of the request.
        slot_id: made here.
        target: where to run.
        fallbacks: where to try next, best first; nothing is reserved there.
        queued_s: time spent in the queue.
        spares: slots for the first of the executions that may come.
    """

    execution_id: str
    slot_id: str
    target: Target
    fallbacks: tuple[Target, ...]
    queued_s: float
    spares: tuple[Spare, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """Tell whoever asked that there will be no slot."""

    execution_id: str
    model_version: str
    refusal: Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class EndStream:
    """End the stream that has this epoch.

    Attributes:
        worker: its name.
        epoch: of the stream to end.
        cause: why.
        current_epoch: epoch that the worker's name has now.
    """

    worker: str
    epoch: int
    cause: StreamEnd
    current_epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeBack:
    """Note that a spare slot has gone to a request.

    Nobody is told: should the spare's execution start all the same, its worker reports it and finds
    room for it in the engine's queue.

    Attributes:
        execution_id: whose slot it was.
        slot_id: of the slot that is no more.
    """

    execution_id: str
    slot_id: str


Command = Grant | Refuse | TakeBack | EndStream
