"""Runs the suite: starts everything in order, keeps it running, stops it in reverse.

The parent of every process and the one who waits for them. Never speaks gRPC itself: its threads
do not survive a fork.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence

from libs.postgres import cluster as postgres
from tools.local import credential, environment, orphan, render, suite
from tools.local.child import Child, Log, Nursery, Spec, StartFailure
from tools.local.model import SIMULATED, ModelError, ServedModel, read_directory, read_model
from tools.local.options import Options
from tools.local.place import DATABASE, HOST, ROLES
from tools.local.plan import Plan, read_answer

PORT_WAIT_S = 1.0
_PORT_POLL_S = 0.1
_TRIM_S = 30.0
SEED = "seed"
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class PortInUse(Exception):
    """Another process listens where ours has to."""


def check_ports(listeners: dict[int, str]) -> None:
    """Makes sure that every port is free.

    Raises:
        PortInUse: names the port and what it is for.
    """
    for port, name in sorted(listeners.items()):
        # A connection of someone else may have the number for a moment.
        give_up_at = time.perf_counter() + PORT_WAIT_S
        while not _is_free(port):
            if time.perf_counter() > give_up_at:
                raise PortInUse(
                    f"port {port} ({name}) is in use. Stop what uses it, or move all ports: "
                    "MAAS_PORT_BASE=51050 make run"
                )
            time.sleep(_PORT_POLL_S)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: connections that are winding down do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


class Supervisor:
    """One run of the suite."""

    def __init__(
        self, options: Options, tell: Callable[[str], None], when_ready: Callable[[], None]
    ) -> None:
        """Prepares nothing yet.

        Args:
            options: what to run.
            tell: shows a line to the user.
            when_ready: called once, after everything works.
        """
        self._options = options
        self._state = options.state
        self._line = tell
        self._when_ready = when_ready
        self._started_s = time.perf_counter()
        self._record = orphan.Record(self._state.processes)
        self._nursery = Nursery(self._record)
        self._stages: list[list[Child]] = []
        self._stop = asyncio.Event()
        self._is_starting = True

    async def run(self) -> int:
        """Starts, watches and stops the suite; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in _STOPPING:
            # Who was started with nohup stays.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                loop.add_signal_handler(number, self._on_signal)
        orphan.adopt_descendants()
        failures: list[str] = []
        try:
            async with asyncio.TaskGroup() as tasks:
                try:
                    is_up = await self._start_or_stop(tasks)
                    if is_up:
                        await self._watch()
                finally:
                    await self._stop_all()
        except* (StartFailure, PortInUse, ModelError, postgres.ClusterError, TimeoutError) as group:
            failures.append(_words(group, self._options.start_timeout_s))
        self._line("\n".join(failures) or "stopped")
        return 1 if failures else 0

    def _tell(self, text: str) -> None:
        if self._is_starting:
            self._line(f"{time.perf_counter() - self._started_s:6.1f} s  {text}")
        else:
            self._line(f"{time.strftime('%H:%M:%S')}  {text}")

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._tell("killing everything")
            for stage in self._stages:
                for child in stage:
                    child.kill()
        self._stop.set()

    async def _start_or_stop(self, tasks: asyncio.TaskGroup) -> bool:
        """Starts everything; False when it was told to stop meanwhile."""
        starting = asyncio.ensure_future(self._start(tasks))
        stopping = asyncio.ensure_future(self._stopped())
        try:
            await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return False
            starting.result()
            return True
        finally:
            for task in (starting, stopping):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    async def _stopped(self) -> None:
        await self._stop.wait()

    async def _start(self, tasks: asyncio.TaskGroup) -> None:
        async with asyncio.timeout(self._options.start_timeout_s):
            model, cluster = await asyncio.to_thread(self._prepare)
            files = render.render(self._options, model, cluster.socket)
            await self._start_stage(tasks, [suite.postgres_spec(cluster)])
            variables = {"MAAS_DATABASE": DATABASE, **credential.passwords(self._state)}
            await asyncio.to_thread(cluster.run_script, ROLES, variables)
            for names in suite.stages(self._options):
                specs = [suite.service_spec(name, files[name], self._options) for name in names]
                await self._start_stage(tasks, specs)
            offering = await self._seed(model)
            environment.write(self._options, offering)
            self._tell("ready")
            self._is_starting = False
            self._line(environment.greeting(self._options, offering))
            self._when_ready()

    def _prepare(self) -> tuple[ServedModel, postgres.Cluster]:
        """Everything that comes before the first process. Blocks for seconds at the first start."""
        left = self._record.end_leftovers(suite.STOP_SIGNALS)
        if left:
            self._tell(f"ended what an earlier run had left: {', '.join(left)}")
        check_ports(suite.listeners(self._options))
        credential.create(self._state)
        model = SIMULATED
        if self._options.model is not None:
            read = read_directory if self._options.engine == "trtllm" else read_model
            model = read(self._options.model, self._state.digests)
        self._tell(f"model {model.version_name}")
        cluster = postgres.place(self._state.root)
        if not cluster.is_created:
            self._tell(f"creating a database in {cluster.data}")
        cluster.create()
        return model, cluster

    async def _start_stage(self, tasks: asyncio.TaskGroup, specs: Sequence[Spec]) -> None:
        """Starts children side by side and waits until all of them are ready."""
        children = [self._child(spec) for spec in specs]
        self._stages.append(children)
        for child in children:
            tasks.create_task(child.keep(), name=child.spec.name)
        async with asyncio.TaskGroup() as waits:
            for child in children:
                waits.create_task(self._await_ready(child))

    def _child(self, spec: Spec) -> Child:
        log = Log(self._state.logs / f"{spec.name}.log")
        return Child(spec, self._nursery, log, self._tell)

    async def _await_ready(self, child: Child) -> None:
        await child.first_ready()
        self._tell(f"{child.spec.name} ready")

    async def _seed(self, model: ServedModel) -> str:
        """Writes the first data from a process of its own; returns what tenants call."""
        log = Log(self._state.logs / "seed.log")
        plan = Plan.of(self._options, model)
        credential.write(plan.file(self._state), plan.to_json())
        argv = [sys.executable, "-m", "tools.seed", "--state", str(self._state.root)]
        if await self._nursery.run(SEED, argv, log) != 0:
            raise StartFailure(f"the first data could not be written:\n{log.tail()}")
        self._tell("first data written")
        return read_answer(self._state)

    async def _watch(self) -> None:
        """Waits for the end, keeping logs within their bounds."""
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TRIM_S):
                    await self._stop.wait()
            for stage in self._stages:
                for child in stage:
                    child.trim_log()

    async def _stop_all(self) -> None:
        """Stops the stages in reverse: nobody loses what it still needs to finish."""
        for stage in reversed(self._stages):
            self._tell(f"stopping {', '.join(child.spec.name for child in stage)}")
            async with asyncio.TaskGroup() as stops:
                for child in stage:
                    stops.create_task(child.stop())


def _words(error: BaseException, start_timeout_s: float) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "\n".join(_words(inner, start_timeout_s) for inner in error.exceptions)
    if isinstance(error, TimeoutError):
        return f"the suite was not ready within {start_timeout_s:.0f} s"
    return str(error)
