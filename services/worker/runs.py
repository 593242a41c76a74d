"""One execution and one stream, as the worker keeps them. Data and the words for its failures."""

from __future__ import annotations

import asyncio

from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2

from libs.clock import Clock
from libs.errors import Cancelled, DeadlineExceeded, Internal, MaasError, Reason, Unavailable
from services.worker.admission import Work
from services.worker.convert import failure_to_pb
from services.worker.engine.base import Lane
from services.worker.outbox import Outbox
from services.worker.text import OutputText, Release, TokenPieces

UNLIMITED_S = float("inf")


class Stream:
    """One ExecuteMany call.

    Attributes:
        outbox: what it has to say.
        runs: by lane, those whose end it has not been told.
        tasks: prepare its long prompts; end with the call.
    """

    def __init__(self, tasks: asyncio.TaskGroup, clock: Clock) -> None:
        self.outbox = Outbox(clock)
        self.runs: dict[int, Run] = {}
        self.tasks = tasks


class Run:
    """One execution.

    Attributes:
        execution_id: what scheduler and gateways know it by.
        stream: that started it.
        outbox: of that stream; here too, because every token asks for it.
        lane: on that stream.
        deadline_s: monotonic.
        interval_s: in which its reader collects output; 0 for a reader that wants it at once.
        engine_lane: in the engine; None while it is being prepared.
        stopped_s: monotonic, when the engine was asked to end it.
        text: its text layer; None while every token is whole text of its own.
        is_capped: see admission.Work.
        is_matching: it has stop sequences, so every token goes through the text layer.
        has_spoken: its first token has been shown. Kept only while the text layer sees its tokens.
        is_told: its stream has been told its end, or is gone.
        failure: why it was stopped from outside.
    """

    __slots__ = (
        "deadline_s",
        "engine_lane",
        "execution_id",
        "failure",
        "has_spoken",
        "interval_s",
        "is_capped",
        "is_matching",
        "is_told",
        "lane",
        "outbox",
        "stopped_s",
        "stream",
        "text",
    )

    def __init__(self, execution: engine_pb2.Execution, stream: Stream, deadline_s: float) -> None:
        self.execution_id = execution.execution_id
        self.stream = stream
        self.outbox = stream.outbox
        self.lane = execution.lane
        self.deadline_s = deadline_s
        self.interval_s = execution.output_interval.ToNanoseconds() / 1e9
        self.engine_lane: Lane | None = None
        self.stopped_s = UNLIMITED_S
        self.text: OutputText | None = None
        self.is_capped = False
        self.is_matching = False
        self.has_spoken = False
        self.is_told = False
        self.failure: MaasError | None = None

    def prime(self, pieces: TokenPieces, work: Work) -> bool:
        """Prepares the text layer: for stop sequences, and behind what was released elsewhere.

        Where output may wait for more, it is also what sees the first token, which may not: other
        executions so pay nothing for each token to find it.

        Returns:
            whether a stop sequence has ended the output already, and only its end was lost.
        """
        released = work.request.continue_ids
        self.is_capped = work.is_capped
        self.is_matching = work.matcher is not None
        if not (self.is_matching or released or self.interval_s):
            return False
        self.text = OutputText(pieces, work.matcher)
        return self.text.prime(released)

    def show(self, release: Release) -> None:
        """Appends released tokens to the columns; their text stands with the last of them."""
        count = len(release.token_ids)
        if count:
            self.outbox.lanes.extend([self.lane] * count)
            self.outbox.token_ids.extend(release.token_ids)
            self.outbox.texts.extend([*[""] * (count - 1), release.text])
            if not self.has_spoken:
                self.has_spoken = True
                self.outbox.urge()

    def tell_end(self, end: generation_pb2.OutputEnd) -> None:
        """Tells the stream that the output ended well."""
        self._tell(engine_pb2.Ended(lane=self.lane, end=end))

    def tell_failure(self, error: MaasError) -> None:
        """Tells the stream that there is no result."""
        self._tell(engine_pb2.Ended(lane=self.lane, failure=failure_to_pb(error)))

    def _tell(self, ended: engine_pb2.Ended) -> None:
        if self.is_told:
            return
        self.is_told = True
        self.stream.runs.pop(self.lane, None)
        self.outbox.end(ended)


def aborted() -> Cancelled:
    """The gateway, or an operator, stopped the execution."""
    return Cancelled("the execution was aborted")


def expired() -> DeadlineExceeded:
    """The execution's budget is used up."""
    return DeadlineExceeded("the deadline of the call passed")


def lost(worker: str) -> Unavailable:
    """The engine is gone, and with it everything on this worker."""
    return Unavailable(
        "the worker's engine died", reason=Reason.WORKER_LOST, metadata={"worker": worker}
    )


def draining(worker: str) -> Unavailable:
    """The worker takes no new work."""
    return Unavailable(
        "the worker is draining", reason=Reason.WORKER_DRAINING, metadata={"worker": worker}
    )


def engine_failure(worker: str) -> Internal:
    """The engine could not run this execution."""
    return Internal("the engine failed", reason=Reason.ENGINE_FAILURE, metadata={"worker": worker})
