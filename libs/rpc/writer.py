"""Writing to the stream of a call without a task for each stream.

A handler that loops over `await context.write(...)` costs two task switches a message: one for
what there is to write, one for the write that is done. With thousands of messages a second that is
the larger part of what Python itself does. Here the coroutine of a write is stepped to the
library's own future at once, wherever the message comes from, and finished by its callback.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class CallWriter:
    """Writes to one call, one message at a time. Belongs to one event loop."""

    __slots__ = ("_on_done", "_write", "_writing")

    def __init__(
        self,
        write: Callable[[Any], Coroutine[Any, Any, None]],
        on_done: Callable[[BaseException | None], None],
    ) -> None:
        """Keeps both.

        Args:
            write: of the call's context.
            on_done: called from the event loop when a message has been taken by the transport, or
                with what prevented that: the call is over then. Never from within `write`.
        """
        self._write = write
        self._on_done = on_done
        self._writing: Coroutine[Any, Any, None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a message waits for the transport."""
        return self._writing is not None

    def write(self, message: object) -> None:
        """Starts to write a message. Not while one waits."""
        assert self._writing is None
        self._writing = self._write(message)
        try:
            future = self._writing.send(None)
        except StopIteration:
            self._writing = None
            asyncio.get_running_loop().call_soon(self._on_done, None)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - whatever it is, the call is over
            self._writing = None
            asyncio.get_running_loop().call_soon(self._on_done, error)
        else:
            # As a task does it: says that whoever awaited it has taken notice.
            future._asyncio_future_blocking = False  # noqa: SLF001 - the protocol of awaitables of asyncio
            future.add_done_callback(self._go_on)

    def _go_on(self, _: asyncio.Future[Any]) -> None:
        assert self._writing is not None
        try:
            future = self._writing.send(None)
        except StopIteration:
            self._writing = None
            self._on_done(None)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - as above
            self._writing = None
            self._on_done(error)
        else:
            future._asyncio_future_blocking = False  # noqa: SLF001 - as above
            future.add_done_callback(self._go_on)
