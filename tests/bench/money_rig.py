"""What the loads of money run against, all of this run: billing as a process, on a PostgreSQL with
fsync, and in this process the money of a gateway, with that gateway's own parts.

No worker, no catalog, no auth: keys and the one offering are put into the gateway's tables by hand.
Prices, limits, slices, quota and settlements go the whole way to PostgreSQL.
"""

from __future__ import annotations

import asyncio
import enum
import gc
import secrets
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from maas.billing.v1 import credit_slice_service_pb2, credit_slice_service_pb2_grpc
from maas.inference.v1 import generation_pb2

from libs import ids, postgres
from libs.auth import KeyRecord, KeyTable, Principal, Role, new_key, permits, sha256_of
from libs.clock import Clock, SystemClock
from libs.config import PostgresSection
from libs.errors import MaasError, Unavailable
from libs.loop import EventLoop
from libs.observability import configure_logs
from libs.postgres import Database, cluster
from libs.process import GARBAGE_YOUNG_MAX, Background
from libs.receipts import key_to_text
from libs.rpc import Peer
from services.billing.domain import Account, EntryKind, Posting, Price
from services.billing.limits import Limit, RateLimit, Scope, ScopeKind, Span, SpendLimit
from services.billing.store import AccountStore, PriceStore
from services.billing.store.limits import LimitStore
from services.gateway import clients
from services.gateway.admission import Admission, Asked
from services.gateway.config import GatewaySection
from services.gateway.domain import Closing, EndCause, Offering, Opening
from services.gateway.gateway import Gateway
from services.gateway.journal import Journal
from services.gateway.receipts import signed_receipt
from services.gateway.settlement import Settlement
from services.gateway.slices import Hold
from tests.bench.load import PROMPT_TOKENS
from tests.bench.settlement import CONFIG, SIGNER, TOKEN
from tests.bench.targets import BenchError, free_ports
from tests.conftest import SERVICES as SCHEMAS
from tests.conftest import PostgresCluster, leashed

OFFERING = "offerings/tiny"
VERSION = "models/tiny/versions/1"
OUTPUT_TOKENS = 64
CREDIT = 10**15
ENOUGH = 10**9
"""Of limits that are looked at and never reached."""
START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0
TABLES_TIMEOUT_S = 20.0
_POLL_S = 0.02
_ULID_BITS = 80

Found = TypeVar("Found")


class Limited(enum.Enum):
    """What an account is limited in; all limits are too large to be reached.

    Attributes:
        NOT: in nothing.
        A_MINUTE: its key and itself in requests and tokens a minute, itself in what it spends in a
            day.
        AT_ONCE: besides, both in generations at the same time.
    """

    NOT = "free"
    A_MINUTE = "minute"
    AT_ONCE = "once"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """An account with credit, one project and one key.

    Attributes:
        number: tells it from others of its kind.
        limited: its kind.
    """

    number: int
    limited: Limited = Limited.NOT

    @property
    def organization(self) -> str:
        """Id of its account, too."""
        return f"{self.limited.value}-{self.number}"

    @property
    def secret(self) -> str:
        """Its key."""
        return new_key(self._key_number, self._key_number).secret

    def record(self) -> KeyRecord:
        """Returns what the table of keys knows of it."""
        return KeyRecord(
            key_id=new_key(self._key_number, self._key_number).key_id,
            secret_sha256=sha256_of(self.secret),
            role=Role.TENANT,
            is_active=True,
            project=self.organization,
            organization=self.organization,
            revision=1,
        )

    @property
    def _key_number(self) -> int:
        return len(Limited) * self.number + list(Limited).index(self.limited) + 1


class Billing:
    """A billing process on a database of its own. Starts and stops as often as asked to.

    Attributes:
        dsn: of the database, as billing's role.
        folder: for files of the run.
        endpoint: host:port; the same for every start.
    """

    def __init__(self, dsn: str, folder: Path) -> None:
        self.dsn = dsn
        self.folder = folder
        port, metrics_port = free_ports(2)
        self.endpoint = f"127.0.0.1:{port}"
        (folder / "token").write_text("ms_billing")
        (folder / "gateway.sha256").write_text(sha256_of(TOKEN).hex())
        (folder / "receipt_keys").write_text(key_to_text(SIGNER.public_key))
        text = CONFIG.format(port=port, metrics_port=metrics_port, state=folder, dsn=dsn)
        # There is no auth to watch, which is not worth a warning a second.
        (folder / "billing.toml").write_text(text.replace('"warning"', '"error"'))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it; returns at once."""
        command = [sys.executable, "-m", "services.billing"]
        self._process = subprocess.Popen(
            [*command, "--config", str(self.folder / "billing.toml")], stdout=sys.stderr
        )

    def stop(self) -> None:
        """Stops it, if it runs, and waits for its end."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """Has it die on the spot."""
        if self._process is not None:
            self._process.kill()
        self.stop()

    async def ready(self) -> None:
        """Waits for its first answer.

        Raises:
            BenchError: there is none in time, or it has ended.
        """
        services = [
            credit_slice_service_pb2.DESCRIPTOR.services_by_name["CreditSliceService"],
        ]
        request = credit_slice_service_pb2.SettleRequest(renew_slice_ids=["nobody"])
        async with Peer(self.endpoint, TOKEN, services) as peer:
            stub = credit_slice_service_pb2_grpc.CreditSliceServiceStub(peer.channel)
            for _ in range(int(START_TIMEOUT_S / _POLL_S)):
                try:
                    await peer.call(stub.Settle, request, timeout_s=1.0)
                except Unavailable:
                    if self._process is None or self._process.poll() is not None:
                        break
                    await asyncio.sleep(_POLL_S)
                else:
                    return
        raise BenchError("billing did not start; what it said is above")


@contextmanager
def billing() -> Iterator[Billing]:
    """Runs PostgreSQL with fsync, and billing on it, for the length of a `with`."""
    with tempfile.TemporaryDirectory(prefix="maas-bench-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        found = cluster.place(folder)
        try:
            with cluster.running(found, prefix=leashed(found.owner)):
                server = PostgresCluster(found, dict.fromkeys(SCHEMAS, "bench"))
                server.create_schemas("maas")
                process = Billing(server.dsn("billing", "maas"), folder)
                process.start()
                try:
                    yield process
                finally:
                    process.stop()
        finally:
            found.destroy()


def run(main: Coroutine[None, None, Found]) -> Found:
    """Runs a measurement as processes of the suite run: on their loop, with their collector."""
    # What is taken away in the middle of a load is missed, and that is no news.
    configure_logs("bench", "error")
    before = gc.get_threshold()
    gc.set_threshold(GARBAGE_YOUNG_MAX, 20, 20)
    try:
        with asyncio.Runner(loop_factory=EventLoop) as runner:
            return runner.run(main)
    finally:
        gc.set_threshold(*before)


async def prepare(process: Billing, tenants: Sequence[Tenant]) -> None:
    """Makes the price, and accounts with credit and limits. Billing has to be ready.

    By way of billing's own store: through its API it would take longer than what is measured.
    """
    now = SystemClock().now()
    config = PostgresSection(dsn=f"{process.dsn}&options=-c%20synchronous_commit%3Doff")
    async with await postgres.connect(config, schema="billing") as database:
        price = Price(
            price_id="price",
            offering_id="tiny",
            input_price=150_000_000,
            output_price=600_000_000,
            effective_time=now,
            create_time=now,
        )
        await PriceStore(database).create_price(price)
        for tenant in tenants:
            await _add(database, tenant)


async def _add(database: Database, tenant: Tenant) -> None:
    now = SystemClock().now()
    name = tenant.organization
    accounts = AccountStore(database)
    await accounts.create_account(Account(account_id=name, display_name=name, create_time=now))
    credit = Posting(
        account_id=name, amount=CREDIT, kind=EntryKind.GRANT, request_id="credit", description=""
    )
    await accounts.post_entry(credit, now)
    if tenant.limited is Limited.NOT:
        return
    rate = RateLimit(
        requests=ENOUGH,
        input_tokens=ENOUGH,
        output_tokens=ENOUGH,
        concurrent_generations=ENOUGH if tenant.limited is Limited.AT_ONCE else None,
    )
    account = Scope(ScopeKind.ACCOUNT, name)
    kinds = (
        ("rate", account, rate),
        ("key", Scope(ScopeKind.API_KEY, tenant.record().key_id), rate),
        ("spend", account, SpendLimit(amount=CREDIT, span=Span.DAY)),
    )
    for prefix, scope, kind in kinds:
        limit = Limit(
            limit_id=f"{prefix}-{name}", account_id=name, scope=scope, kind=kind, create_time=now
        )
        await LimitStore(database).create_limit(limit)


@dataclass(frozen=True, slots=True)
class Running:
    """A generation between its opening and its end.

    Attributes:
        ordinal: in the journal.
        opening: what was written there.
        hold: the price of what it is going to release, to the nano.
    """

    ordinal: int
    opening: Opening
    hold: Hold


class Till:
    """The money of a gateway: what admission and settlement go through, and nothing behind.

    Attributes:
        gateway: with its tables, its book of slices and its settler.
        admission: of the gateway.
        journal: of the gateway.
        clock: time.
    """

    def __init__(self, gateway: Gateway, journal: Journal, keys: KeyTable, clock: Clock) -> None:
        self.gateway = gateway
        self.admission: Admission = gateway.generations._admission
        self.journal = journal
        self.clock = clock
        self._keys = keys

    def principal(self, secret: str) -> Principal:
        """Looks a key up, and whether it may generate, as the stack of every call does."""
        found = self._keys.authenticate(secret, self.clock.monotonic_s())
        assert permits(found.role, "generations.create")
        return found

    def freshen(self) -> None:
        """Says that the keys are as auth has them; without it they are too old after a minute."""
        self._keys.touch(self.clock.monotonic_s())

    def asked(self, secret: str) -> Asked:
        """Makes a request of a tenant: 32 tokens in, 64 out at most."""
        spec = generation_pb2.GenerationSpec(
            model="tiny",
            tokens=generation_pb2.TokenIds(ids=range(300, 300 + PROMPT_TOKENS)),
            stop=generation_pb2.StopOptions(max_output_tokens=OUTPUT_TOKENS),
        )
        return Asked(
            spec=spec,
            request_id="",
            request_sha256="",
            lives_on=False,
            is_unary=False,
            principal=self.principal(secret),
            arrived_s=self.clock.monotonic_s(),
            deadline_s=None,
        )

    def opened(self, asked: Asked, hold: Hold) -> Running:
        """Journals a generation, as if a worker had accepted it."""
        now = self.clock.now()
        opening = Opening(
            generation_id=f"gen_bench_{ids.ulid(now, secrets.randbits(_ULID_BITS))}",
            slice_id=hold.slice.slice_id,
            account=asked.account,
            project=asked.project,
            api_key=asked.api_key,
            offering=OFFERING,
            model_version=VERSION,
            price="prices/price",
            input_tokens=PROMPT_TOKENS,
            start_time=now,
        )
        return Running(self.journal.opened(opening), opening, hold)

    def ended(self, running: Running) -> Settlement:
        """Ends a generation that ran to its length, and queues its settlement."""
        opening, owed = running.opening, running.hold.nanos
        closing = Closing(
            output_tokens=OUTPUT_TOKENS, cause=EndCause.COMPLETED, end_time=self.clock.now()
        )
        closing = replace(closing, receipt=signed_receipt(SIGNER, opening, closing, owed))
        self.gateway._book.owe(running.hold, owed)
        self.journal.closed(running.ordinal, closing)
        settlement = Settlement(
            ordinal=running.ordinal, opening=opening, closing=closing, owed=owed
        )
        self.gateway._settler.put(settlement)
        return settlement


@asynccontextmanager
async def till(process: Billing, tenants: Sequence[Tenant]) -> AsyncIterator[Till]:
    """Opens the money of a gateway; at its end everything is settled and given back.

    Args:
        process: ready, and prepared for the tenants.
        tenants: whose keys are known.

    Raises:
        BenchError: its tables stay empty.
    """
    clock = SystemClock()
    keys = KeyTable()
    keys.apply(tenant.record() for tenant in tenants)
    keys.touch(clock.monotonic_s())
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        journal = Journal(process.folder / f"journal-{secrets.token_hex(4)}")
        stack.callback(journal.close)
        peer = await enter(Peer(process.endpoint, TOKEN, clients.BILLING_SERVICES))
        # Placement is not measured here: nobody listens at this address.
        scheduler = await enter(Peer("127.0.0.1:1", TOKEN, clients.SCHEDULER_SERVICES))
        background = await enter(Background())
        gateway = Gateway(
            GatewaySection(instance="bench", journal_dir=process.folder),
            journal=journal,
            billing=peer,
            scheduler=scheduler,
            credential=TOKEN,
            background=background,
            keys=keys,
            clock=clock,
            cache_secret=b"secret of a bench",
        )
        _offer(gateway)
        background.start(clients.follow_prices(peer, gateway.prices), name="follow prices")
        background.start(clients.follow_limits(peer, gateway.limits), name="follow limits")
        await _until(lambda: _knows(gateway, tenants), "the gateway's tables are not complete")
        await gateway.start()
        yield Till(gateway, journal, keys, clock)
        await gateway.finish()


def _offer(gateway: Gateway) -> None:
    """Puts the one offering into the tables, and says that they are complete."""
    offering = Offering(
        name=OFFERING,
        model_version=VERSION,
        context_length=4096,
        default_max_output_tokens=512,
        default_temperature=1.0,
        default_top_p=1.0,
        default_top_k=0,
        prompt_overhead_tokens=0,
        message_overhead_tokens=0,
    )
    gateway.offerings.apply([offering])
    gateway.offerings.complete()
    gateway.workers.complete()


def _knows(gateway: Gateway, tenants: Sequence[Tenant]) -> bool:
    """Tells whether the watches have brought the price, and the limits of who is limited."""
    try:
        gateway.prices.get(OFFERING, SystemClock().now())
        known = [gateway.limits.of(f"accounts/{tenant.organization}") for tenant in tenants]
    except MaasError:
        return False
    return all(
        limits is not None and len(limits._by_scope) == 2
        for tenant, limits in zip(tenants, known, strict=True)
        if tenant.limited is not Limited.NOT
    )


async def _until(is_so: Callable[[], bool], complaint: str) -> None:
    for _ in range(int(TABLES_TIMEOUT_S / _POLL_S)):
        if is_so():
            return
        await asyncio.sleep(_POLL_S)
    raise BenchError(complaint)
