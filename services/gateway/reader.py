"""One call that reads a generation: where it is, and what keeps it waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from libs.errors import Cancelled, MaasError
from libs.rpc.writer import CallWriter

if TYPE_CHECKING:
    from maas.inference.v1 import generation_pb2

    Write = Callable[[Any], Coroutine[Any, Any, None]]
    Respond = Callable[[generation_pb2.GenerationFrame], object]


class Reader:
    """A call attached to a generation.

    Attributes:
        key_id: of the caller.
        cursor: sequence of the last frame that was handed to the transport.
        takes: whether frames are written to it; a unary call only waits for the end.
        is_replay: its request repeats another one's request_id.
        writing_since_s: since when a write waits for the client; None while none does.
        done: set when the call has all it can get; or the error to end it with.
    """

    __slots__ = (
        "_due_s",
        "_interval_s",
        "_loop",
        "_on_ready",
        "_respond",
        "_timer",
        "_writer",
        "cursor",
        "done",
        "is_replay",
        "key_id",
        "takes",
        "writing_since_s",
    )

    def __init__(
        self,
        key_id: str,
        *,
        write: Write | None = None,
        respond: Respond | None = None,
        interval_s: float = 0.0,
        after_sequence: int = 0,
        is_replay: bool = False,
    ) -> None:
        """Makes a reader on the running loop.

        Args:
            key_id: of the caller.
            write: of the call's context; None for a unary call.
            respond: makes the method's response of a frame.
            interval_s: least time between two deltas.
            after_sequence: last frame that the caller has.
            is_replay: its request repeats another one's request_id.
        """
        self._loop = asyncio.get_running_loop()
        self.key_id = key_id
        self.cursor = after_sequence
        self.takes = write is not None
        self.is_replay = is_replay
        self.writing_since_s: float | None = None
        self.done: asyncio.Future[None] = self._loop.create_future()
        self._respond = respond
        self._writer = CallWriter(write, self._written) if write is not None else None
        self._interval_s = interval_s
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._on_ready: Callable[[], None] | None = None

    @property
    def is_idle(self) -> bool:
        """Whether a frame may be written to it."""
        return self._writer is not None and not self._writer.is_busy and not self.done.done()

    def attach(self, on_ready: Callable[[], None]) -> None:
        """Has `on_ready` called whenever it has become idle or due."""
        self._on_ready = on_ready

    def is_due(self) -> bool:
        """Tells whether the next delta may go now; if not, `on_ready` is called when it may."""
        if not self._interval_s or self._loop.time() >= self._due_s:
            return True
        if self._timer is None:
            self._timer = self._loop.call_at(self._due_s, self._wake)
        return False

    def write(self, frame: generation_pb2.GenerationFrame) -> None:
        """Hands a frame to the transport."""
        assert self._writer is not None
        assert self._respond is not None
        self.cursor = frame.sequence
        now_s = self._loop.time()
        self.writing_since_s = now_s
        if self._interval_s and frame.HasField("delta"):
            self._due_s = now_s + self._interval_s
        self._writer.write(self._respond(frame))

    def complete(self) -> None:
        """Says that it has all that there is."""
        if not self.done.done():
            self.done.set_result(None)

    def fail(self, error: MaasError) -> None:
        """Ends the call with an error. May be repeated; the first one stays."""
        if not self.done.done():
            self.done.set_exception(error)
            # A handler that was cancelled does not ask any more; that is no defect.
            self.done.exception()

    def detach(self) -> None:
        """Forgets the generation."""
        self._on_ready = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wake(self) -> None:
        self._timer = None
        if self._on_ready is not None:
            self._on_ready()

    def _written(self, error: BaseException | None) -> None:
        self.writing_since_s = None
        if error is not None:
            # The call is over on the other side; its handler is told by the library.
            self.fail(Cancelled("the caller went away"))
        elif self._on_ready is not None:
            self._on_ready()
