"""The event loop of every process: uvloop, with one addition for grpc.aio.

The library's poller thread writes a byte into a socket for each operation that is done, and the
loop's callback reads one byte and then handles all operations that are done by then. After a burst
of n operations the loop so goes around n - 1 times for nothing, each time with two system calls.
Here the bytes of all operations that are about to be handled are read at once.

Nothing is lost: an operation is in the queue before its byte is written, and the callback empties
the queue after the bytes were read. Should a future version of the library do this differently, the
addition finds nothing to do.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from typing import Any

import uvloop
from typing_extensions import override

_BYTES_MAX = 4096
_POLLER = "PollerCompletionQueue._handle_events"


class EventLoop(uvloop.Loop):
    """uvloop's loop, which reads what grpc.aio's poller has written in one go."""

    @override
    def add_reader(  # type: ignore[override]  # whatever uvloop takes, in its own words
        self, fd: Any, callback: Callable[..., Any], *args: Any
    ) -> None:
        """Watches a file descriptor; see asyncio."""
        if isinstance(fd, socket.socket) and _POLLER in repr(callback):
            super().add_reader(fd, _all_but_one, fd, functools.partial(callback, *args))
        else:
            super().add_reader(fd, callback, *args)


def _all_but_one(wakes: socket.socket, callback: Callable[[], object]) -> None:
    """Leaves the callback the one byte that it reads by itself."""
    count = len(wakes.recv(_BYTES_MAX, socket.MSG_PEEK))
    if count > 1:
        wakes.recv(count - 1)
    callback()
