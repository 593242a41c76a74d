"""Durable settlements per second: `python -m tests.bench.settlement`. About 15 seconds.

A billing process and a PostgreSQL with fsync, both of this run, and a client that settles batches
of 500 as gateways do, one call in flight each; all on this machine, client included. Once spread
over many accounts, once on a single one. A disk's fsync differs by a factor of thirty between
machines and hours, so the time of one is measured beside each figure.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maas.billing.v1 import credit_slice_service_pb2 as slice_pb
from maas.billing.v1 import credit_slice_service_pb2_grpc, ledger_pb2
from maas.common.v1 import usage_pb2

from libs import postgres
from libs.auth import sha256_of
from libs.clock import SystemClock
from libs.config import PostgresSection
from libs.errors import Unavailable
from libs.postgres import cluster
from libs.rpc import Peer
from services.billing.domain import Account, EntryKind, Posting, Price
from services.billing.store import AccountStore, PriceStore, SliceStore, SliceWish
from tests.bench.processes import children_of, cpu_s
from tests.conftest import SERVICES as SCHEMAS
from tests.conftest import PostgresCluster, leashed

BATCH = 500
GATEWAYS = 2
SECONDS = 4.0
ACCOUNTS = 200
CREDIT = 10**15
PORT = 58953
TOKEN = "ms_gateway"
SLICE_SERVICE = slice_pb.DESCRIPTOR.services_by_name["CreditSliceService"]
CONFIG = """
[server]
listen = "127.0.0.1:{port}"
metrics_listen = "127.0.0.1:{metrics_port}"
[log]
level = "warning"
[identity]
name = "billing"
token_file = "{state}/token"
[identity.callers]
gateway = "{state}/gateway.sha256"
[identity.allow]
"maas.billing.v1.PriceService/WatchPrices" = ["gateway"]
"maas.billing.v1.CreditSliceService/AcquireSlice" = ["gateway"]
"maas.billing.v1.CreditSliceService/Settle" = ["gateway"]
"maas.billing.v1.CreditSliceService/FindSettlement" = ["gateway"]
"maas.billing.v1.CreditSliceService/CloseSlices" = ["gateway"]
"maas.billing.v1.LimitService/WatchLimits" = ["gateway"]
"maas.billing.v1.QuotaService/TakeQuota" = ["gateway"]
"maas.billing.v1.QuotaService/GiveBackQuota" = ["gateway"]
"maas.billing.v1.QuotaService/HoldPlaces" = ["gateway"]
[auth]
endpoint = "127.0.0.1:1"
[postgres]
dsn = "{dsn}"
"""


def fsync_ms(folder: Path) -> float:
    """Median time of writing one page and waiting until the disk has it, milliseconds."""
    times = []
    with (folder / "fsync").open("wb") as file:
        for _ in range(50):
            started = time.perf_counter()
            file.write(bytes(8192))
            file.flush()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - started)
    return statistics.median(times) * 1000


@contextmanager
def billing_process(state: Path, dsn: str) -> Iterator[int]:
    """Runs billing; gives its process id."""
    (state / "token").write_text("ms_billing")
    (state / "gateway.sha256").write_text(sha256_of(TOKEN).hex())
    config = state / "billing.toml"
    text = CONFIG.format(port=PORT, metrics_port=PORT + 1000, state=state, dsn=dsn)
    config.write_text(text)
    process = subprocess.Popen(
        [sys.executable, "-m", "services.billing", "--config", str(config)],
        stdout=subprocess.DEVNULL,
    )
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait()


async def prepare(dsn: str) -> None:
    """Makes accounts with credit, a price, and a slice for each account."""
    now = SystemClock().now()
    config = PostgresSection(dsn=f"{dsn}&options=-c%20synchronous_commit%3Doff")
    async with await postgres.connect(config, schema="billing") as database:
        accounts = AccountStore(database)
        slices = SliceStore(database, lease_s=3600, grace_s=3600)
        price = Price(
            price_id="price",
            offering_id="tiny",
            input_price=150_000_000,
            output_price=600_000_000,
            effective_time=now,
            create_time=now,
        )
        await PriceStore(database).create_price(price)
        for index in range(ACCOUNTS):
            name = f"acme-{index}"
            account = Account(account_id=name, display_name=name, create_time=now)
            await accounts.create_account(account)
            posting = Posting(
                account_id=name,
                amount=CREDIT,
                kind=EntryKind.GRANT,
                request_id="credit",
                description="",
            )
            await accounts.post_entry(posting, now)
            wish = SliceWish(
                slice_id=f"slice-{index}",
                account_id=name,
                holder="bench",
                required=CREDIT,
                wanted=CREDIT,
            )
            await slices.acquire(wish, now)


def batch_of(run: str, start: int, accounts: int) -> slice_pb.SettleRequest:
    """Makes the next batch, as a gateway does."""
    request = slice_pb.SettleRequest()
    for number in range(start, start + BATCH):
        account = number % accounts
        item = request.settlements.add(
            generation_id=f"gen_bench_{run}_{number:026}",
            slice_id=f"slice-{account}",
            account=f"accounts/acme-{account}",
            project="projects/demo",
            api_key="apiKeys/0123456789ab",
            offering="offerings/tiny",
            model_version="models/tiny/versions/1",
            price="prices/price",
            usage=usage_pb2.TokenUsage(input_tokens=100 + number % 1000, output_tokens=200),
            end_cause=ledger_pb2.END_CAUSE_COMPLETED,
        )
        item.start_time.GetCurrentTime()
        item.end_time.GetCurrentTime()
    return request


async def settle_for(run: str, accounts: int) -> tuple[float, list[float]]:
    """Settles for a while; returns settlements per second and the seconds of each call."""
    call_s: list[float] = []
    counts: list[int] = []

    async def gateway(index: int, until: float) -> None:
        async with Peer(f"127.0.0.1:{PORT}", TOKEN, [SLICE_SERVICE]) as peer:
            stub = credit_slice_service_pb2_grpc.CreditSliceServiceStub(peer.channel)
            start = 0
            while time.perf_counter() < until:
                request = batch_of(f"{run}{index}", start, accounts)
                asked = time.perf_counter()
                response = await peer.call(stub.Settle, request)
                call_s.append(time.perf_counter() - asked)
                counts.append(response.settled_count)
                start += BATCH

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for index in range(GATEWAYS):
            group.create_task(gateway(index, started + SECONDS))
    return sum(counts) / (time.perf_counter() - started), call_s


async def wait_until_up() -> None:
    """Waits for the first answer of the process."""
    async with Peer(f"127.0.0.1:{PORT}", TOKEN, [SLICE_SERVICE]) as peer:
        stub = credit_slice_service_pb2_grpc.CreditSliceServiceStub(peer.channel)
        request = slice_pb.SettleRequest(renew_slice_ids=["nobody"])
        while True:
            try:
                await peer.call(stub.Settle, request)
            except Unavailable:
                await asyncio.sleep(0.1)
            else:
                return


async def measure(pid: int, postmaster: int, folder: Path) -> None:
    """Runs both loads and prints a line for each."""
    rates = {}
    for name, accounts in (("spread", ACCOUNTS), ("hot", 1)):
        disk_ms = fsync_ms(folder)
        before = [cpu_s(pid), cpu_of_all(postmaster), cpu_s(os.getpid())]
        rates[name], call_s = await settle_for(name, accounts)
        after = [cpu_s(pid), cpu_of_all(postmaster), cpu_s(os.getpid())]
        count = rates[name] * SECONDS
        billing_us, postgres_us, client_us = (
            (new - old) / count * 1e6 for new, old in zip(after, before, strict=True)
        )
        ordered = sorted(call_s)
        print(
            f"{name:7} {rates[name]:8.0f} settlements/s   "
            f"call p50 {ordered[len(ordered) // 2] * 1000:5.1f} ms "
            f"p99 {ordered[int(len(ordered) * 0.99)] * 1000:5.1f} ms   "
            f"fsync {disk_ms:.2f} ms   CPU us each: "
            f"billing {billing_us:.0f} postgres {postgres_us:.0f} client {client_us:.0f}"
        )
    print(f"hot / spread {rates['hot'] / rates['spread']:.2f}")


def cpu_of_all(pid: int) -> float:
    """CPU time of a process and its descendants."""
    return cpu_s(pid) + sum(cpu_s(child) for child in children_of(pid))


def main() -> None:
    """Runs everything in a temporary directory."""
    with tempfile.TemporaryDirectory(prefix="maas-bench-") as folder:
        state = Path(folder)
        state.chmod(0o711)
        found = cluster.place(state)
        try:
            with cluster.running(found, prefix=leashed(found.owner)):
                server = PostgresCluster(found, dict.fromkeys(SCHEMAS, "bench"))
                server.create_schemas("maas")
                dsn = server.dsn("billing", "maas")
                postmaster = int((found.data / "postmaster.pid").read_text().split()[0])
                with billing_process(state, dsn) as pid:
                    asyncio.run(run(dsn, pid, postmaster, state))
        finally:
            found.destroy()


async def run(dsn: str, pid: int, postmaster: int, folder: Path) -> None:
    """Waits for billing, fills the database, measures."""
    await wait_until_up()
    await prepare(dsn)
    await measure(pid, postmaster, folder)


if __name__ == "__main__":
    main()
