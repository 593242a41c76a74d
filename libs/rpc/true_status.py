"""The status of a stream that ends while it is written to.

A write to a stream that the other side has just ended fails, often before the status of that end
has come to the event loop. The library makes up one then, INTERNAL, and keeps it: whoever was
refused at the door, or fenced, would never learn why. Here such a write waits for the true status
and goes nowhere; the next read or write tells.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from grpc.aio import InternalError

if TYPE_CHECKING:
    from grpc.aio import StreamStreamCall

Request = TypeVar("Request")
Response = TypeVar("Response")

# Both come from the same end of the stream, one right behind the other.
STATUS_WAIT_S = 1.0
# Of the library, and not public: nothing that is comes before the made-up status.
_CORE = "_cython_call"
_NEEDED = ("receive_serialized_message", "send_serialized_message", "status")


def keep_true_status(call: StreamStreamCall[Request, Response]) -> None:
    """Has a call keep the status that the other side ends it with. Before its first write.

    Where the library is made otherwise, the call stays as it is, with the status that it makes up.
    """
    outside: Any = call
    core = getattr(outside, _CORE, None)
    if all(hasattr(core, name) for name in _NEEDED):
        setattr(outside, _CORE, _Core(core))


class _Core:
    """The library's own call, but for failing writes."""

    __slots__ = ("_core", "receive_serialized_message")

    def __init__(self, core: Any) -> None:
        self._core = core
        # Once for each message; what is rarer is looked up.
        self.receive_serialized_message = core.receive_serialized_message

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    async def send_serialized_message(self, message: bytes) -> None:
        """Sends, or waits for the reason why that is not possible any more."""
        try:
            await self._core.send_serialized_message(message)
        except InternalError:
            try:
                async with asyncio.timeout(STATUS_WAIT_S):
                    await self._core.status()
            except TimeoutError:
                pass
            else:
                return
            raise
