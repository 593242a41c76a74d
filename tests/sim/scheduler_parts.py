"""The things of the simulated world: what a worker, its stream and a request are made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.scheduler.core.messages import EngineInfo, SlotAsked
from services.scheduler.core.state import Settings

SETTINGS = Settings(
    lease_s=3.0,
    start_within_s=1.0,
    queue_length_max=6,
    gather_s=0.7,
    lost_kept_s=5.0,
    lost_kept_max=2,
)
FAULTS_S = 15.0
SETTLE_S = 25.0
TICK_S = 0.2
HEARTBEAT_S = 1.0
WAIT_MAX_S = 4.0
RUN_MAX_S = 5.0
LOAD_MAX_S = 2.0
VERSIONS = ("models/m/versions/1", "models/m/versions/2")
# How many executions a worker queues in its engine beyond those it runs.
WAITING_MAX = 2


@dataclass(slots=True, eq=False)
class Stream:
    """A worker's connection. `is_deaf`: messages are lost and nobody knows yet."""

    worker: SimWorker
    incarnation: str
    epoch: int
    is_open: bool = True
    is_deaf: bool = False
    is_registered: bool = False
    in_flight: int = 0
    delivered_s: float = 0.0


@dataclass(slots=True, eq=False)
class SimWorker:
    """A worker's process, or the place where one is going to start."""

    name: str
    capacity: int
    versions: tuple[str, ...]
    incarnation: str = ""
    is_alive: bool = False
    is_draining: bool = False
    is_loading: bool = False
    epoch: int = 0
    stream: Stream | None = None
    running: set[str] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Request:
    """A request of a gateway.

    Attributes:
        ask: what it asked.
        outcome: how it ended; empty while it waits.
        slot_id: of its grant.
        answers_due: asks that have not been answered.
        is_placed_alone: its gateway did not wait for the scheduler's answer.
    """

    ask: SlotAsked
    outcome: str = ""
    slot_id: str = ""
    answers_due: int = 0
    is_placed_alone: bool = False


def info_of(worker: SimWorker) -> EngineInfo:
    """What a worker says that it is."""
    return EngineInfo(
        engine="sim",
        engine_version="1",
        model_versions=worker.versions,
        context_length=4096,
        max_running=worker.capacity,
        max_waiting=WAITING_MAX,
        vocabulary_size=100,
        digest="",
    )
