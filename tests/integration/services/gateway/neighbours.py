"""What stands around a gateway under test: billing, a scheduler, keys, a model and its price."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from datetime import UTC, datetime

from libs.auth import KeyRecord, KeyTable, Role, new_key, sha256_of
from libs.clock import Clock
from libs.errors import FailedPrecondition, MaasError, Reason, unavailable
from libs.units import Rates
from services.gateway.domain import Adapter, Charged, Offering, Price, usage_of
from services.gateway.placement import Slot, Target, Wanted
from services.gateway.settlement import Settled, Settlement
from services.gateway.slices import Grant, Purse
from services.gateway.tables import Offerings, Prices, no_ready_worker
from tests.integration.services.gateway.neighbours_quota import QuotaBilling

VERSION = "models/m/versions/1"
# Of input and of output alike.
NANOS_PER_TOKEN = 1000
# Of input that the prefix cache had.
NANOS_PER_CACHED_TOKEN = 100
DIGEST = "sha256:" + 64 * "0"
ADAPTERS = [
    Adapter(
        name=f"adapters/{name}", model_version=version, path=name, digest=DIGEST, project=project
    )
    for name, version, project in (
        ("shared", VERSION, ""),
        ("own", VERSION, "projects/p"),
        ("foreign", VERSION, "projects/q"),
        ("older", "models/m/versions/0", ""),
    )
]


@dataclass
class Billing:
    """One account, and what was settled on it.

    Attributes:
        available: nanos that are not set aside.
        settled: in the order of the calls.
        is_away: whether nothing is answered but the acquisition of slices.
        lookups: idempotency keys that were asked for.
        acquired: purse, required and wanted nanos of each slice that was asked for.
        refusal: what every question for a slice is answered with, once there is one.
        quota: rate limits.
        granted: what is left of open slices, by their ids.
    """

    available: int = 10**9
    settled: list[Settlement] = field(default_factory=list)
    is_away: bool = False
    lookups: list[str] = field(default_factory=list)
    acquired: list[tuple[Purse, int, int]] = field(default_factory=list)
    refusal: MaasError | None = None
    granted: dict[str, int] = field(default_factory=dict)
    quota: QuotaBilling = field(default_factory=QuotaBilling)

    async def acquire(self, slice_id: str, purse: Purse, required: int, wanted: int) -> Grant:
        """Sets money aside."""
        self.acquired.append((purse, required, wanted))
        if self.refusal is not None:
            raise self.refusal
        if self.available < required:
            raise FailedPrecondition(
                "no credit", reason=Reason.INSUFFICIENT_CREDIT, metadata={"account": purse.account}
            )
        granted = min(wanted, self.available)
        self.available -= granted
        self.granted[slice_id] = granted
        return Grant(granted, 60.0)

    async def settle(self, settlements: list[Settlement], _: list[str]) -> Settled:
        """Takes settlements."""
        if self.is_away:
            raise unavailable("billing")
        self.settled += settlements
        for item in settlements:
            if item.opening.slice_id in self.granted:
                self.granted[item.opening.slice_id] -= item.owed
        return Settled(lost_slice_ids=[], lease_s=60.0)

    async def close(self, slice_ids: list[str]) -> None:
        """Takes slices back."""
        for slice_id in slice_ids:
            self.available += self.granted.pop(slice_id, 0)

    async def find_charged(self, project: str, request_id: str) -> Charged | None:
        """Finds what was settled and charged under an idempotency key."""
        self.lookups.append(request_id)
        if self.is_away:
            raise unavailable("billing")
        for item in self.settled:
            opening, closing = item.opening, item.closing
            if (opening.project, opening.request_id) != (project, request_id):
                continue
            if closing.cause.is_charged:
                return Charged(
                    generation_id=opening.generation_id,
                    request_sha256=opening.request_sha256,
                    usage=usage_of(opening, closing),
                    nanos=item.owed,
                )
        return None


class Scheduler:
    """Names the workers that the test gave, in that order, without those excluded."""

    def __init__(self) -> None:
        self.targets: list[Target] = []
        self.released: list[str] = []
        self.asked: list[Wanted] = []
        self.is_away = False

    async def acquire(self, wanted: Wanted, execution_id: str, exclude: list[str]) -> Slot:
        """Gives a slot."""
        self.asked.append(wanted)
        if self.is_away:
            raise unavailable("scheduler")
        targets = [target for target in self.targets if target.worker not in exclude]
        if not targets:
            raise no_ready_worker(wanted.model_version)
        return Slot(slot_id=f"slot-{execution_id}", targets=targets)

    def release(self, slot_id: str) -> None:
        """Takes a slot back."""
        self.released.append(slot_id)


@dataclass(frozen=True, slots=True)
class Caller:
    """A key and whose it is.

    Attributes:
        key_id: public part.
        secret: the whole key.
        project: id of its project.
        organization: id of the organization that pays.
    """

    key_id: str
    secret: str
    project: str
    organization: str

    def record(self) -> KeyRecord:
        """Makes what the table of keys knows of it."""
        return KeyRecord(
            key_id=self.key_id,
            secret_sha256=sha256_of(self.secret),
            role=Role.TENANT,
            is_active=True,
            project=self.project,
            organization=self.organization,
            revision=1,
        )


def _caller(number: int, project: str, organization: str) -> Caller:
    key = new_key(number, number)
    return Caller(key.key_id, key.secret, project, organization)


ALICE = _caller(1, "p", "o")
# Another key of the same project.
BOB = _caller(2, "p", "o")
# Another project.
EVE = _caller(3, "q", "o2")


def key_table(clock: Clock) -> KeyTable:
    """Makes a fresh table that knows all callers."""
    table = KeyTable()
    table.apply([caller.record() for caller in (ALICE, BOB, EVE)])
    table.touch(clock.monotonic_s())
    return table


def revoke(table: KeyTable, caller: Caller) -> None:
    """Revokes a key, as auth's watch would."""
    table.apply([dataclasses.replace(caller.record(), is_active=False, revision=2)])


RATES = Rates(
    input_price=NANOS_PER_TOKEN * 10**6,
    output_price=NANOS_PER_TOKEN * 10**6,
    cached_input_price=NANOS_PER_CACHED_TOKEN * 10**6,
)
"""Tokens cost a thousand nanos each, in and out."""


def tables(rates: Rates = RATES) -> tuple[Offerings, Prices]:
    """Makes one model and its price."""
    offerings, prices = Offerings(), Prices()
    offerings.apply(
        [
            Offering(
                name="offerings/m",
                model_version=VERSION,
                context_length=1000,
                default_max_output_tokens=512,
                default_temperature=1.0,
                default_top_p=1.0,
                default_top_k=0,
                prompt_overhead_tokens=0,
                message_overhead_tokens=0,
            )
        ]
    )
    prices.apply(
        [
            Price(
                name="prices/p",
                offering="offerings/m",
                rates=rates,
                effective_time=datetime(2026, 1, 1, tzinfo=UTC),
            )
        ]
    )
    return offerings, prices
