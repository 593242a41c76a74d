"""Durable settlements per second: `python -m tests.bench.settlement`. About a minute.

A billing process and a PostgreSQL with fsync, both of this run, and a client that settles what
gateways settle, as they do: signed receipts, leases renewed when due, engine time, every second
with an idempotency key, every fourth with labels; one call in flight each. All on this machine,
client included. A disk's fsync differs by a factor of thirty between machines and hours, so the
time of one is measured beside each figure. The auditor, who verifies every receipt once more,
waits meanwhile.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from maas.billing.v1 import credit_slice_service_pb2 as slice_pb
from maas.billing.v1 import credit_slice_service_pb2_grpc

from libs import postgres
from libs.auth import sha256_of
from libs.clock import SystemClock
from libs.config import PostgresSection
from libs.errors import Unavailable
from libs.postgres import cluster
from libs.receipts import ReceiptSigner, key_to_text
from libs.rpc import Peer
from services.billing.domain import Account, EntryKind, Posting, Price
from services.billing.limits import Limit, Scope, ScopeKind, Span, SpendLimit
from services.billing.store import AccountStore, PriceStore, SliceStore, SliceWish
from services.billing.store.limits import LimitStore
from services.billing.store.windows import SpendWindowStore
from services.gateway.convert import settlement_to_pb
from services.gateway.domain import Closing, EndCause, Opening
from services.gateway.receipts import signed_receipt
from tests.bench.measure import quantile
from tests.bench.processes import children_of, cpu_s
from tests.bench.report import table
from tests.bench.targets import free_ports
from tests.conftest import SERVICES as SCHEMAS
from tests.conftest import PostgresCluster, leashed

SECONDS = 4.0
QUICK_SECONDS = 0.5
ACCOUNTS = 200
CREDIT = 10**15
ENGINE_TIME_NS = 1_234_567_000
# Far beyond what is settled and called in a second: what is signed beforehand is not used up.
RATE_MAX = 20_000
CALLS_MAX = 2_000
TOKEN = "ms_gateway"
SIGNER = ReceiptSigner(bytes(range(32)))
SLICE_SERVICE = slice_pb.DESCRIPTOR.services_by_name["CreditSliceService"]
NOW = datetime(2026, 1, 1, tzinfo=UTC)
PRICE = Price(
    price_id="price",
    offering_id="tiny",
    input_price=150_000_000,
    output_price=600_000_000,
    effective_time=NOW,
    create_time=NOW,
)
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
[billing]
receipt_keys_file = "{state}/receipt_keys"
audit_interval = "3600s"
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is settled.

    Attributes:
        name: for people, and a part of generation ids.
        accounts: over how many accounts the settlements are spread.
        gateways: how many settle at the same time.
        batch: settlements of a call.
        is_limited: the accounts have spend limits of a day and a month.
    """

    name: str
    accounts: int = ACCOUNTS
    gateways: int = 2
    batch: int = 500
    is_limited: bool = False

    def account_of(self, number: int) -> str:
        """The account that a settlement goes to."""
        kind = "limited" if self.is_limited else "acme"
        return f"{kind}-{number % self.accounts}"


LOADS = (
    Load(name="spread"),
    Load(name="hot", accounts=1),
    Load(name="limited", is_limited=True),
    Load(name="gateways4", gateways=4),
    Load(name="batch100", batch=100),
    Load(name="batch1", batch=1),
)
WARM_UP = Load(name="warmup")
WARM_UP_S = 1.0
"""Before the first load: statements are prepared and caches filled once in a process's life."""
GATEWAYS_MAX = max(load.gateways for load in LOADS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The billing process.

    Attributes:
        pid: its process.
        port: where it listens.
    """

    pid: int
    port: int


@contextmanager
def billing_process(state: Path, dsn: str) -> Iterator[Server]:
    """Runs billing."""
    (state / "token").write_text("ms_billing")
    (state / "gateway.sha256").write_text(sha256_of(TOKEN).hex())
    (state / "receipt_keys").write_text(key_to_text(SIGNER.public_key))
    config = state / "billing.toml"
    port, metrics_port = free_ports(2)
    config.write_text(CONFIG.format(port=port, metrics_port=metrics_port, state=state, dsn=dsn))
    process = subprocess.Popen(
        [sys.executable, "-m", "services.billing", "--config", str(config)],
        stdout=subprocess.DEVNULL,
    )
    try:
        yield Server(pid=process.pid, port=port)
    finally:
        process.terminate()
        process.wait()


async def prepare(dsn: str) -> None:
    """Makes accounts with credit, a price, limits, and a slice for each account and gateway."""
    config = PostgresSection(dsn=f"{dsn}&options=-c%20synchronous_commit%3Doff")
    async with await postgres.connect(config, schema="billing") as database:
        await PriceStore(database).create_price(PRICE)
        for index in range(ACCOUNTS):
            for name in (f"acme-{index}", f"limited-{index}"):
                await make_account(database, name)


async def make_account(database: postgres.Database, name: str) -> None:
    """Makes an account with credit, its limits if it has some, and its slices."""
    now = SystemClock().now()
    account = Account(account_id=name, display_name=name, create_time=now)
    await AccountStore(database).create_account(account)
    posting = Posting(
        account_id=name, amount=CREDIT, kind=EntryKind.GRANT, request_id="credit", description=""
    )
    await AccountStore(database).post_entry(posting, now)
    if name.startswith("limited"):
        for span in Span:
            limit = Limit(
                limit_id=f"{name}-{span.value}",
                account_id=name,
                scope=Scope(ScopeKind.ACCOUNT, name),
                kind=SpendLimit(amount=CREDIT, span=span, alert_percents=(50, 100)),
                create_time=now,
            )
            await LimitStore(database).create_limit(limit)
    slices = SliceStore(database, lease_s=3600, grace_s=3600, spend=SpendWindowStore())
    for gateway in range(GATEWAYS_MAX):
        wish = SliceWish(
            slice_id=f"{name}-{gateway}",
            account_id=name,
            holder=f"bench-{gateway}",
            required=1,
            wanted=CREDIT // GATEWAYS_MAX,
        )
        await slices.acquire(wish, now)


def ended(load: Load, gateway: int, number: int) -> tuple[Opening, Closing]:
    """Makes what a gateway has in hand of a generation that has ended."""
    account = load.account_of(number)
    opening = Opening(
        generation_id=f"gen_{load.name}{gateway}_{number:026}",
        slice_id=f"{account}-{gateway}",
        account=f"accounts/{account}",
        project="projects/demo",
        api_key="apiKeys/0123456789ab",
        offering="offerings/tiny",
        model_version="models/tiny/versions/1",
        price="prices/price",
        input_tokens=100 + number % 1000,
        start_time=NOW,
        request_id=f"request-{number:010}" if number % 2 else "",
        request_sha256="ab" * 32 if number % 2 else "",
        labels={"team": "search"} if number % 4 == 0 else {},
    )
    closing = Closing(output_tokens=200, cause=EndCause.COMPLETED, end_time=NOW)
    charge = PRICE.rates.charge(input_tokens=opening.input_tokens, output_tokens=200)
    receipt = signed_receipt(SIGNER, opening, closing, charge)
    return opening, dataclasses.replace(closing, receipt=receipt)


Batch = Sequence[tuple[Opening, Closing]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a gateway settles.

    Attributes:
        batches: one a call.
        slice_ids: its open slices, whose leases its first call renews.
    """

    batches: list[Batch]
    slice_ids: list[str]


def work_of(load: Load, gateway: int, seconds: float) -> Work:
    """Makes more than a gateway settles in that time: signed when it ends, not when it is sent."""
    rate = min(RATE_MAX // load.batch, CALLS_MAX) / load.gateways
    numbers = itertools.count()
    return Work(
        batches=[
            [ended(load, gateway, next(numbers)) for _ in range(load.batch)]
            for _ in range(int(rate * seconds) + 1)
        ],
        slice_ids=[f"{load.account_of(number)}-{gateway}" for number in range(load.accounts)],
    )


@dataclass(slots=True)
class Result:
    """What calls did.

    Attributes:
        settled: settlements that were new.
        elapsed_s: from the first call to the last answer.
        call_s: seconds of each call.
    """

    settled: int = 0
    elapsed_s: float = 0.0
    call_s: list[float] = field(default_factory=list)


async def settle(port: int, works: Sequence[Work], seconds: float) -> Result:
    """Settles for so many seconds the batches of each gateway."""
    result = Result()

    async def gateway(work: Work, until: float) -> None:
        async with Peer(f"127.0.0.1:{port}", TOKEN, [SLICE_SERVICE]) as peer:
            stub = credit_slice_service_pb2_grpc.CreditSliceServiceStub(peer.channel)
            # Leases are renewed each quarter of their time, which is longer than a run.
            due = work.slice_ids
            for batch in work.batches:
                if time.perf_counter() >= until:
                    return
                request = slice_pb.SettleRequest(
                    settlements=[
                        settlement_to_pb(opening, closing, engine_time_ns=ENGINE_TIME_NS)
                        for opening, closing in batch
                    ],
                    renew_slice_ids=due,
                )
                due = []
                asked = time.perf_counter()
                response = await peer.call(stub.Settle, request)
                result.call_s.append(time.perf_counter() - asked)
                result.settled += response.settled_count

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for work in works:
            group.create_task(gateway(work, started + seconds))
    result.elapsed_s = time.perf_counter() - started
    return result


async def wait_until_up(port: int) -> None:
    """Waits for the first answer of the process."""
    async with Peer(f"127.0.0.1:{port}", TOKEN, [SLICE_SERVICE]) as peer:
        stub = credit_slice_service_pb2_grpc.CreditSliceServiceStub(peer.channel)
        request = slice_pb.SettleRequest(renew_slice_ids=["nobody"])
        while True:
            try:
                await peer.call(stub.Settle, request)
            except Unavailable:
                await asyncio.sleep(0.1)
            else:
                return


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where everything runs.

    Attributes:
        server: billing.
        postmaster: process id of PostgreSQL.
        folder: on the disk of the database.
    """

    server: Server
    postmaster: int
    folder: Path

    def clocks(self) -> list[float]:
        """CPU seconds so far: of billing, PostgreSQL and this process."""
        database = [self.postmaster, *children_of(self.postmaster)]
        return [cpu_s(self.server.pid), sum(map(cpu_s, database)), cpu_s(os.getpid())]


async def measure(load: Load, place: Place, seconds: float) -> tuple[float, list[str]]:
    """Settles; returns settlements a second, and a row of the table."""
    works = [work_of(load, gateway, seconds) for gateway in range(load.gateways)]
    disk_ms = fsync_ms(place.folder)
    before = place.clocks()
    result = await settle(place.server.port, works, seconds)
    spent = [new - old for new, old in zip(place.clocks(), before, strict=True)]
    rate = result.settled / result.elapsed_s
    row = [
        load.name,
        str(load.gateways),
        str(load.batch),
        f"{rate:.0f}",
        *(f"{quantile(result.call_s, share) * 1000:.1f}" for share in (0.5, 0.99)),
        f"{disk_ms:.2f}",
        *(f"{cpu / result.settled * 1e6:.0f}" for cpu in spent),
    ]
    return rate, row


HEADER = ("load", "gateways", "batch", "settled/s", "p50 ms", "p99 ms", "fsync ms")
HEADER_CPU = ("billing us", "postgres us", "client us")


async def run(dsn: str, place: Place, seconds: float, loads: Sequence[Load]) -> None:
    """Waits for billing, fills the database, measures."""
    await wait_until_up(place.server.port)
    await prepare(dsn)
    await measure(WARM_UP, place, min(seconds, WARM_UP_S))
    rates: dict[str, float] = {}
    rows = []
    for load in loads:
        rates[load.name], row = await measure(load, place, seconds)
        rows.append(row)
    table("durable settlements; CPU of each", [*HEADER, *HEADER_CPU], rows)
    if {"spread", "hot"} <= rates.keys():
        print(f"  hot / spread {rates['hot'] / rates['spread']:.2f}")


def settlement(repeats: int, *, is_quick: bool) -> None:
    """Measures `repeats` times, each on an empty database; briefly if asked to."""
    seconds = QUICK_SECONDS if is_quick else SECONDS
    for _ in range(repeats):
        measure_loads(LOADS, seconds)


def measure_loads(loads: Sequence[Load], seconds: float) -> None:
    """Runs everything in a temporary directory."""
    with tempfile.TemporaryDirectory(prefix="maas-bench-") as folder:
        state = Path(folder)
        state.chmod(0o711)
        found = cluster.place(state)
        try:
            with cluster.running(found, prefix=leashed(found.owner)):
                database = PostgresCluster(found, dict.fromkeys(SCHEMAS, "bench"))
                database.create_schemas("maas")
                dsn = database.dsn("billing", "maas")
                postmaster = int((found.data / "postmaster.pid").read_text().split()[0])
                with billing_process(state, dsn) as server:
                    place = Place(server=server, postmaster=postmaster, folder=state)
                    asyncio.run(run(dsn, place, seconds, loads))
        finally:
            found.destroy()


def main() -> None:
    """Measures once: all loads, or those that are named."""
    names = sys.argv[1:]
    measure_loads([load for load in LOADS if not names or load.name in names], SECONDS)


if __name__ == "__main__":
    main()
