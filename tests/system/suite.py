"""The whole suite as real processes, as `make run` starts it, with a client of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from maas.billing.v1 import account_service_pb2 as accounts
from maas.billing.v1 import ledger_pb2
from maas.billing.v1.account_service_pb2_grpc import AccountServiceStub
from maas.inference.v1 import generation_pb2
from maas.inference.v1 import generation_service_pb2 as generations
from maas.inference.v1.generation_service_pb2_grpc import GenerationServiceStub

from libs import errors, rpc
from libs.postgres import cluster
from tools.local import guard, orphan, probe
from tools.local.place import Ports, State
from tools.local.temporary import free_ports

START_TIMEOUT_S = 120.0


class Suite:
    """One state directory and what runs on it."""

    def __init__(self, root: Path, base: int) -> None:
        self.state = State(root)
        self.base = base

    def up(self, *flags: str) -> subprocess.CompletedProcess[str]:
        """Runs `make run ARGS=--detach` without make's own set-up of the environment."""
        return subprocess.run(
            [*self.command(*flags), "--detach"],
            env={**os.environ, "MAAS_PORT_BASE": str(self.base)},  # noqa: TID251 - for a child
            capture_output=True,
            text=True,
            check=False,
            timeout=START_TIMEOUT_S + 30,
        )

    def command(self, *flags: str) -> list[str]:
        """Command line of the supervisor in the foreground, simulated engine unless told."""
        engine = [] if "--engine" in flags else ["--engine", "sim"]
        return [sys.executable, "-m", "tools.up", "--state", str(self.state.root), *engine, *flags]

    def start(self, *flags: str) -> None:
        """Starts it; fails the test with its words when it does not come up."""
        run = self.up(*flags)
        assert run.returncode == 0, run.stdout + run.stderr

    def stop(self) -> None:
        """Stops it, if it runs."""
        run = subprocess.run(
            [sys.executable, "-m", "tools.down", "--state", str(self.state.root)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert run.returncode == 0, run.stdout + run.stderr

    @property
    def supervisor(self) -> int | None:
        """Process id of the supervisor; None when there is none."""
        return guard.holder(self.state.supervisor)

    def pids(self) -> dict[str, int]:
        """Process ids by name, as started last."""
        record = json.loads(self.state.processes.read_text())
        return {name: pid for name, (pid, _start) in record["started"].items() if name != "seed"}

    def children(self, name: str) -> list[int]:
        """Processes whose parent is the named one: PostgreSQL's backends, a worker's engine."""
        parent = self.pids()[name]
        return [item.pid for item in orphan.all_processes() if item.parent == parent]

    async def is_serving(self) -> bool:
        """Whether every process says SERVING; PostgreSQL has to be asked through them."""
        ports = [Ports(self.base).of_process(name) for name in self.pids() if name != "postgres"]
        return all([await probe.is_serving(port) for port in ports])

    def environment(self) -> dict[str, str]:
        """Variables of dev.env, as a shell would read them."""
        lines = self.state.environment.read_text().splitlines()
        pairs = (re.fullmatch(r"export (\w+)=(.*)", line) for line in lines)
        return {pair[1]: shlex.split(pair[2])[0] for pair in pairs if pair is not None}

    def log(self, name: str) -> str:
        """Log of a process."""
        return (self.state.logs / f"{name}.log").read_text()


@contextlib.contextmanager
def new_suite() -> Iterator[Suite]:
    """A suite that has not been started, in a place of its own; stopped and removed afterwards."""
    root = Path(tempfile.mkdtemp(prefix="maas-suite-"))
    suite = Suite(root, free_ports().base)
    try:
        yield suite
    finally:
        suite.stop()
        if (root / "postgres").exists():
            cluster.place(root).destroy()
        shutil.rmtree(root)


class Client:
    """A tenant and an operator of a suite."""

    def __init__(self, suite: Suite) -> None:
        self.variables = suite.environment()

    @contextlib.asynccontextmanager
    async def connect(
        self, service: str, *services: ServiceDescriptor, key: str | None = None
    ) -> AsyncIterator[rpc.Peer]:
        """Connects to a service, as the tenant unless another key is given."""
        endpoint = self.variables[f"MAAS_{service.upper()}"]
        async with rpc.Peer(endpoint, key or self.variables["MAAS_API_KEY"], services) as peer:
            yield peer

    async def generate(
        self, text: str = "Once upon a time", *, max_output_tokens: int = 16
    ) -> list[generation_pb2.GenerationFrame]:
        """Streams a generation; returns its frames."""
        request = generations.StreamGenerateRequest(
            spec=generation_pb2.GenerationSpec(
                model=self.variables["MAAS_MODEL"],
                text=text,
                stop=generation_pb2.StopOptions(
                    max_output_tokens=max_output_tokens, ignore_eos=True
                ),
            )
        )
        metadata = (("authorization", f"Bearer {self.variables['MAAS_API_KEY']}"),)
        async with grpc.aio.insecure_channel(self.variables["MAAS_ENDPOINT"]) as channel:
            stub = GenerationServiceStub(channel)
            call = stub.StreamGenerate(request, metadata=metadata, timeout=30)
            return [response.frame async for response in call]

    async def balance(self) -> ledger_pb2.Balance:
        """Money of the tenant."""
        service = accounts.DESCRIPTOR.services_by_name["AccountService"]
        async with self.connect("billing", service) as peer:
            stub = AccountServiceStub(peer.channel)
            response = await peer.call(stub.GetBalance, accounts.GetBalanceRequest())
            return response.balance

    async def ledger_sum(self) -> int:
        """Nanos over all entries of all accounts."""
        service = accounts.DESCRIPTOR.services_by_name["AccountService"]
        total, page_token = 0, ""
        async with self.connect("billing", service, key=self.variables["MAAS_ADMIN_KEY"]) as peer:
            stub = AccountServiceStub(peer.channel)
            while True:
                request = accounts.ListLedgerEntriesRequest(
                    parent="accounts/-", page_size=1000, page_token=page_token
                )
                response = await peer.call(stub.ListLedgerEntries, request)
                total += sum(entry.amount.nanos for entry in response.entries)
                page_token = response.next_page_token
                if not page_token:
                    return total

    async def whole_within(self, suite: Suite, timeout_s: float) -> None:
        """Waits until every process serves and a generation goes through and is settled."""
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        cause = ""
        while loop.time() - started_s < timeout_s:
            try:
                if await suite.is_serving():
                    await self.generate()
                    await self.balance()
                    return
                cause = "not every process serves"
            except (grpc.aio.AioRpcError, errors.MaasError) as error:
                cause = repr(error)
            await asyncio.sleep(0.05)
        raise AssertionError(f"not whole after {timeout_s} s: {cause}")


def kill(pid: int) -> None:
    """kill -9, of a process that a test's own suite has started."""
    os.kill(pid, signal.SIGKILL)


def wait_gone(pids: list[int], within_s: float) -> None:
    """Waits until none of the processes lives."""
    give_up_at = time.perf_counter() + within_s
    while living := [
        pid for pid in pids if (found := orphan.find(pid)) is not None and found.state != "Z"
    ]:
        assert time.perf_counter() < give_up_at, f"still there: {living}"
        time.sleep(0.02)


async def eventually_settled(client: Client) -> None:
    """Nothing is held and the ledger sums to zero, within the time that slices may idle."""
    for _ in range(100):
        if (await client.balance()).held.nanos == 0:
            break
        await asyncio.sleep(0.1)
    assert (await client.balance()).held.nanos == 0
    assert await client.ledger_sum() == 0
