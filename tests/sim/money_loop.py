"""An event loop of virtual time, and processes in it that halt and die between any two steps.

Everything runs in one thread. A process is what runs in a context that names it: its tasks, their
callbacks and timers. Each callback is a step. The steps of a halted process wait until it goes on,
those of a dead one are never taken: so it may die at any await, and mid-step wherever it calls
`Process.die`. When nothing is ready the clock jumps to the next timer.
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
import selectors
from collections.abc import Callable, Coroutine, Generator
from datetime import datetime, timedelta
from typing import Any, TypeVar

from typing_extensions import override

from libs.clock import SystemClock
from libs.testing.clock import START

Result = TypeVar("Result")

_PROCESS: contextvars.ContextVar[Process] = contextvars.ContextVar("sim_process")
# Steps at one moment of virtual time: more is a loop that never lets time pass.
STEPS_MAX = 200_000
# Rounds in which the tasks of a dead process are ended: some begin others when they end.
BURIALS_MAX = 20


class Died(BaseException):
    """The process that was about to go on is dead."""


class Stuck(BaseException):
    """Nothing will ever happen again, or time does not pass any more."""


class State(enum.Enum):
    """How a process is."""

    RUNNING = 1
    HALTED = 2
    DEAD = 3


class _Selector(selectors.SelectSelector):
    """Waits for no file, but for the next timer: by moving the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self._idle = 0

    @override
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Stuck("nothing will ever happen again")
        self._idle = 0 if timeout > 0 else self._idle + 1
        if self._idle > STEPS_MAX:
            raise Stuck("time does not pass any more")
        self.now_s += max(timeout, 0.0)
        return []


class Loop(asyncio.SelectorEventLoop):
    """The event loop. `defects` has what tasks and callbacks have failed with unseen."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)
        self.defects: list[str] = []
        self.set_exception_handler(self._note)

    @override
    def time(self) -> float:
        return self._virtual.now_s

    @override
    def call_soon(  # type: ignore[override]  # what is called is not looked at
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        context = contextvars.copy_context() if context is None else context
        process = context.get(_PROCESS)
        if process is None:
            return super().call_soon(callback, *args, context=context)
        step = _Step(process, callback, args, context)
        step.handle = super().call_soon(step, context=context)
        return step.handle

    @override
    def call_at(  # type: ignore[override]  # what is called is not looked at
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        context = contextvars.copy_context() if context is None else context
        process = context.get(_PROCESS)
        if process is None:
            return super().call_at(when, callback, *args, context=context)
        step = _Step(process, callback, args, context)
        handle = super().call_at(when, step, context=context)
        step.handle = handle
        return handle

    @override
    def create_task(
        self,
        coro: Generator[Any, None, Result] | Coroutine[Any, Any, Result],
        *,
        name: object = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[Result]:
        context = contextvars.copy_context() if context is None else context
        task = super().create_task(coro, name=name, context=context)
        process = context.get(_PROCESS)
        if process is not None:
            # Nobody else may know the tasks of a dead process, and they must not be finalized.
            process.tasks.append(task)
        return task

    def again(self, step: _Step) -> None:
        """Takes a step that had to wait, unless it is taken back meanwhile."""
        super().call_soon(step, context=step.context)

    def note_end(self, task: asyncio.Task[None]) -> None:
        """Notes what a task has failed with that nobody waits for."""
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, Died):
            self.defects.append(f"a task failed: {error!r}")

    def _note(self, _: asyncio.AbstractEventLoop, event: dict[str, Any]) -> None:
        error = event.get("exception")
        if error is None or isinstance(error, Died):
            # A task of a dead process that is never waited for.
            return
        self.defects.append(f"{event['message']}: {error!r}")


class _Step:
    """One callback of a process."""

    __slots__ = ("args", "callback", "context", "handle", "process")

    def __init__(
        self,
        process: Process,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: contextvars.Context,
    ) -> None:
        self.process = process
        self.callback = callback
        self.args = args
        self.context = context
        self.handle: asyncio.Handle | None = None

    def __call__(self) -> None:
        process = self.process
        if self.handle is not None and self.handle.cancelled():
            return
        if process.state is not State.RUNNING:
            process.waits(self)
            return
        process.steps += 1
        if process.steps == process.dies_at:
            process.kill()
            process.waits(self)
            return
        try:
            self.callback(*self.args)
        except Died:
            # It is dead, and this was the step that it has died in.
            return


class Process:
    """A process.

    Attributes:
        tasks: all that it has ever had.
        steps: taken so far.
        dies_at: number of the step that it dies before; 0 for none.
        is_buried: it is dead, and what is left of it is being cleared away.
    """

    def __init__(self, loop: Loop, on_death: Callable[[], None]) -> None:
        self._loop = loop
        self._on_death = on_death
        self._waiting: list[_Step] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.state = State.RUNNING
        self.steps = 0
        self.dies_at = 0
        self.is_buried = False

    @staticmethod
    def current() -> Process | None:
        """Returns the process that runs now; None outside of all."""
        return _PROCESS.get(None)

    def start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Starts a task of this process."""
        context = contextvars.Context()
        context.run(_PROCESS.set, self)
        task = self._loop.create_task(coroutine, context=context)
        # Outside of the process: also of one that has died of it.
        task.add_done_callback(self._loop.note_end, context=contextvars.Context())
        return task

    def halt(self) -> None:
        """SIGSTOP."""
        if self.state is State.RUNNING:
            self.state = State.HALTED

    def go_on(self) -> None:
        """SIGCONT: everything that has come meanwhile is due at once, in the order of its time."""
        if self.state is State.HALTED:
            self.state = State.RUNNING
            self._take_up()

    def kill(self) -> None:
        """SIGKILL."""
        if self.state is not State.DEAD:
            self.state = State.DEAD
            self._on_death()

    def die(self) -> None:
        """SIGKILL in the middle of a step: nothing behind this is done.

        Raises:
            Died: always.
        """
        self.kill()
        raise Died

    def waits(self, step: _Step) -> None:
        """Keeps a step for later, if there is a later: at the burial at least."""
        self._waiting.append(step)

    def _take_up(self) -> None:
        waiting, self._waiting = self._waiting, []
        for step in waiting:
            self._loop.again(step)

    async def bury(self) -> None:
        """Ends what is left of a dead process; nothing that it does then reaches anybody.

        Without this, finalizers would run whenever garbage is collected.
        """
        self.is_buried = True
        self.state = State.RUNNING
        self.dies_at = 0
        self._take_up()
        for _ in range(BURIALS_MAX):
            left = [task for task in self.tasks if not task.done()]
            if not left:
                break
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=1.0)
        self.state = State.DEAD


class SimClock(SystemClock):
    """The clocks of one machine: its wall clock may be wrong."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.skew_s = 0.0

    @override
    def now(self) -> datetime:
        return START + timedelta(seconds=self._loop.time() + self.skew_s)

    @override
    def monotonic_s(self) -> float:
        return self._loop.time()
