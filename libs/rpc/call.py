"""The call that runs now: who makes it and until when. Set by the stack, read by handlers."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from libs.auth import Principal
from libs.rpc.policy import MethodPolicy

# The client's own timer fires first: deadlines travel rounded up, and start when they arrive.
DEADLINE_SLACK_S = 0.05


@dataclass(slots=True, kw_only=True)
class Call:
    """One call of one method.

    Attributes:
        policy: what the contract says about the method.
        request_id: for logs and errors; the caller's, or made here.
        started_s: monotonic arrival.
        deadline_s: monotonic end; None for endless streams.
        principal: caller with an API key.
        service: caller that is a service of the suite.
    """

    policy: MethodPolicy
    request_id: str
    started_s: float
    deadline_s: float | None
    principal: Principal | None = None
    service: str | None = None

    def is_overdue(self, now_s: float) -> bool:
        """Tells whether a cancellation at that monotonic time is the deadline's doing."""
        return self.deadline_s is not None and now_s >= self.deadline_s - DEADLINE_SLACK_S

    def require_principal(self) -> Principal:
        """Returns the caller of a public method, which the stack has authenticated."""
        assert self.principal is not None
        return self.principal


_current: ContextVar[Call] = ContextVar("maas_call")


def current_call() -> Call:
    """Returns the call whose handler runs in this task."""
    return _current.get()


def set_current_call(call: Call) -> None:
    """Makes a call the current one of this task."""
    _current.set(call)
