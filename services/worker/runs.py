"""Executions, outputs and streams, as the worker keeps them. Data, and the words for failures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2

from libs.clock import Clock
from libs.errors import Cancelled, DeadlineExceeded, Internal, MaasError, Reason, Unavailable
from services.worker.convert import duration_to_pb, failure_to_pb
from services.worker.engine.base import Lane
from services.worker.outbox import Outbox
from services.worker.rich import RichOutput
from services.worker.rows import Row
from services.worker.stops import StopMatcher
from services.worker.text import OutputText, Release, TokenPieces
from services.worker.work import Work

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


class Place:
    """One execution, or one call of Embed: what scheduler and gateways know by its id.

    It takes one place on the scheduler's books until the engine has ended all of its outputs.

    Attributes:
        execution_id: its name.
        deadline_s: monotonic; then it has failed.
        limit_s: monotonic; then its outputs end well.
        runs: its outputs, output 0 first; none for a call of Embed.
        open: outputs that the engine, or somebody else who holds on to the place, has not ended.
        is_started: the scheduler has been told of it.
        failure: why it was stopped from outside.
        stop: stops a call that has no outputs.
        preparing: makes its prompt; None for one that was made at once.
    """

    __slots__ = (
        "deadline_s",
        "execution_id",
        "failure",
        "is_started",
        "limit_s",
        "open",
        "preparing",
        "runs",
        "stop",
    )

    def __init__(
        self, execution_id: str, deadline_s: float = UNLIMITED_S, limit_s: float = UNLIMITED_S
    ) -> None:
        self.execution_id = execution_id
        self.deadline_s = deadline_s
        self.limit_s = limit_s
        self.runs: list[Run] = []
        self.open = 0
        self.is_started = False
        self.failure: MaasError | None = None
        self.stop: Callable[[], object] | None = None
        self.preparing: asyncio.Task[None] | None = None

    @property
    def due_s(self) -> float:
        """Monotonic time at which something has to be done about it.

        Outputs that have not started cannot end well; they do when they start.
        """
        return min(self.deadline_s, self.limit_s) if self.is_started else self.deadline_s


class Run:
    """One output of an execution: one lane of its stream, and one of the engine.

    Attributes:
        place: of the execution.
        stream: that started it.
        outbox: of that stream; here too, because every token asks for it.
        lane: on that stream.
        interval_s: in which its reader collects output; 0 for a reader that wants it at once.
        engine_lane: in the engine; None while it is being prepared.
        engine_time_s: seconds of the engine that it took; known once it speaks no more.
        text: its text layer; None while every token is whole text of its own.
        rich: what it shows besides text; None for text alone.
        matcher: finds its stop sequences; None for none.
        includes_stop: the stop sequence that matches is shown.
        is_capped: see admission.Work.
        is_matching: every token goes through the text layer: it has stop sequences, or is rich.
        has_spoken: its first token has been shown. Kept only while the text layer sees its tokens.
        is_told: its stream has been told its end, or is gone.
    """

    __slots__ = (
        "engine_lane",
        "engine_time_s",
        "has_spoken",
        "includes_stop",
        "interval_s",
        "is_capped",
        "is_matching",
        "is_told",
        "lane",
        "matcher",
        "outbox",
        "place",
        "rich",
        "stream",
        "text",
    )

    def __init__(self, place: Place, stream: Stream, lane: int, interval_s: float) -> None:
        self.place = place
        self.stream = stream
        self.outbox = stream.outbox
        self.lane = lane
        self.interval_s = interval_s
        self.engine_lane: Lane | None = None
        self.engine_time_s = 0.0
        self.text: OutputText | None = None
        self.rich: RichOutput | None = None
        self.matcher: StopMatcher | None = None
        self.includes_stop = False
        self.is_capped = False
        self.is_matching = False
        self.has_spoken = False
        self.is_told = False
        place.runs.append(self)

    def prime(self, pieces: TokenPieces, work: Work) -> bool:
        """Prepares the text layer: for stop sequences, and behind what was released elsewhere.

        Where output may wait for more, it is also what sees the first token, which may not: other
        executions so pay nothing for each token to find it.

        Returns:
            whether a stop sequence has ended the output already, and only its end was lost.
        """
        released: Sequence[int] = work.requests[0].continue_ids
        self.is_capped = work.is_capped
        self.matcher = work.matcher
        self.includes_stop = work.includes_stop
        self.rich = work.rich(pieces, self.place.runs.index(self)) if work.is_rich else None
        self.is_matching = self.matcher is not None or self.rich is not None
        if not (self.is_matching or released or self.interval_s):
            return False
        self.text = self.new_text(pieces)
        if self.rich is not None:
            released = self.rich.prime(released)
        return self.text.prime(released)

    def new_text(self, pieces: TokenPieces) -> OutputText:
        """Makes a text layer that has seen nothing."""
        return OutputText(pieces, self.matcher, includes_stop=self.includes_stop)

    def show(self, release: Release) -> None:
        """Appends released tokens to the columns; their text stands with the last of them."""
        if self.rich is not None:
            self.show_row(self.rich.push(release))
            return
        count = len(release.token_ids)
        if count:
            self.outbox.lanes.extend([self.lane] * count)
            self.outbox.token_ids.extend(release.token_ids)
            self.outbox.texts.extend([*[""] * (count - 1), release.text])
            self._speak()

    def show_row(self, row: Row | None) -> None:
        """Adds a row that is more than text, if there is one."""
        if row is not None:
            self.outbox.rich.add(self.lane, row)
            self._speak()

    def show_rest(self) -> None:
        """Shows what is held behind the text layer, at an end that is not an abort."""
        if self.rich is not None:
            self.show_row(self.rich.finish())

    def tell_end(self, end: generation_pb2.OutputEnd) -> None:
        """Tells the stream that the output ended well."""
        self._tell(engine_pb2.Ended(lane=self.lane, end=end))

    def tell_failure(self, error: MaasError) -> None:
        """Tells the stream that there is no result."""
        self._tell(engine_pb2.Ended(lane=self.lane, failure=failure_to_pb(error)))

    def _speak(self) -> None:
        if not self.has_spoken:
            self.has_spoken = True
            self.outbox.urge()

    def _tell(self, ended: engine_pb2.Ended) -> None:
        if self.is_told:
            return
        self.is_told = True
        if self.engine_time_s > 0:
            ended.engine_time.CopyFrom(duration_to_pb(self.engine_time_s))
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
