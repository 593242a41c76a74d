"""What an operator sees and does: workers and their load, keys, usage records, balances."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, timedelta

import grpc
from maas.auth.v1 import api_key_service_pb2 as api_keys
from maas.auth.v1 import tenancy_pb2
from maas.auth.v1 import tenancy_service_pb2 as tenancy
from maas.auth.v1.api_key_service_pb2_grpc import ApiKeyServiceStub
from maas.auth.v1.tenancy_service_pb2_grpc import TenancyServiceStub
from maas.billing.v1 import account_service_pb2 as accounts
from maas.billing.v1 import ledger_pb2
from maas.billing.v1 import price_service_pb2 as prices
from maas.billing.v1 import usage_service_pb2 as usage
from maas.billing.v1.account_service_pb2_grpc import AccountServiceStub
from maas.billing.v1.price_service_pb2_grpc import PriceServiceStub
from maas.billing.v1.usage_service_pb2_grpc import UsageServiceStub
from maas.catalog.v1 import adapter_service_pb2, model_pb2
from maas.catalog.v1.adapter_service_pb2_grpc import AdapterServiceStub
from maas.scheduler.v1 import worker_pb2
from maas.scheduler.v1 import worker_service_pb2 as workers
from maas.scheduler.v1.worker_service_pb2_grpc import WorkerServiceStub

from libs.clock import Clock
from libs.errors import Code
from libs.units import Rates
from tools.conformance.client import Refusal, Tenant
from tools.conformance.verdict import Mismatch

POLL_S = 0.02
SETTLED_S = 5.0
"""Longest time from an end to its usage record; a gateway that restarts needs some."""
REST_S = 10.0
"""Longest time until nothing is held and nothing runs."""
OTHER_PROJECT = "conformance-other"
_PAGE_SIZE = 1000
_DAY_S = 86_400.0
_CLOCKS_APART_S = 2.0


async def within(limit_s: float, condition: Callable[[], Awaitable[bool]]) -> bool:
    """Waits until a condition holds; False when it did not in time."""
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + limit_s
    while not await condition():
        if loop.time() >= give_up_s:
            return False
        await asyncio.sleep(POLL_S)
    return True


async def past_midnight(clock: Clock, needed_s: float) -> None:
    """Waits for the next day of UTC, where this one ends in less than is needed.

    Args:
        clock: a little apart from the deployment's, perhaps.
        needed_s: how long what follows may take.
    """
    now = clock.now().astimezone(UTC)
    midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    left_s = (midnight - now).total_seconds()
    since_s = _DAY_S - left_s
    if left_s < needed_s:
        await clock.sleep_s(left_s + _CLOCKS_APART_S)
    elif since_s < _CLOCKS_APART_S:
        # The deployment's day may have a moment left.
        await clock.sleep_s(_CLOCKS_APART_S - since_s)


class Books:
    """The tenant's money."""

    def __init__(self, channel: grpc.aio.Channel, tenant: Tenant) -> None:
        self._tenant = tenant
        self._accounts = AccountServiceStub(channel)
        self._usage = UsageServiceStub(channel)
        self._prices = PriceServiceStub(channel)

    async def posted(self) -> int:
        """Nanos of the account, once nothing is on its way: held is zero, or patience ended."""
        await within(REST_S, self._is_at_rest)
        return (await self._balance()).posted.nanos

    async def records(self, generation_id: str) -> list[ledger_pb2.UsageRecord]:
        """Usage records of a generation, as they are now."""
        request = usage.ListUsageRecordsRequest(generation_id=generation_id, page_size=_PAGE_SIZE)
        response = await self._tenant.call(self._usage.ListUsageRecords, request)
        return list(response.usage_records)

    async def record(self, generation_id: str) -> ledger_pb2.UsageRecord:
        """The one usage record of a generation.

        Raises:
            Mismatch: there is none in time, or more than one.
        """

        async def is_settled() -> bool:
            return bool(await self.records(generation_id))

        await within(SETTLED_S, is_settled)
        found = await self.records(generation_id)
        if len(found) != 1:
            raise Mismatch(f"expected one usage record, got {len(found)} after {SETTLED_S:g} s")
        return found[0]

    async def is_priced(self, record: ledger_pb2.UsageRecord) -> bool:
        """Whether the charge of a record is that of its usage, at the price that it names."""
        request = prices.GetPriceRequest(name=record.price)
        price = (await self._tenant.call(self._prices.GetPrice, request)).price
        usage = record.usage
        wanted = rates_of(price).charge(
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cached_input_tokens=usage.cached_input_tokens,
            reasoning_tokens=usage.reasoning_tokens,
            is_background=record.background,
        )
        return record.charge.nanos == wanted

    async def _is_at_rest(self) -> bool:
        return (await self._balance()).held.nanos == 0

    async def _balance(self) -> ledger_pb2.Balance:
        request = accounts.GetBalanceRequest()
        return (await self._tenant.call(self._accounts.GetBalance, request)).balance


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A worker.

    Attributes:
        name: "workers/{worker}".
        incarnation: of the process.
        is_ready: it takes work.
        capacity: executions at the same time.
        context_length: tokens.
        busy: executions that run or wait in it, as last reported.
    """

    name: str
    incarnation: str
    is_ready: bool
    capacity: int
    context_length: int
    busy: int


class Fleet:
    """The workers, as the scheduler lists them."""

    def __init__(self, channel: grpc.aio.Channel, administrator: Tenant) -> None:
        self._administrator = administrator
        self._stub = WorkerServiceStub(channel)

    async def members(self) -> list[Member]:
        """All workers that are not lost."""
        request = workers.ListWorkersRequest(page_size=_PAGE_SIZE)
        response = await self._administrator.call(self._stub.ListWorkers, request)
        return [
            Member(
                name=worker.name,
                incarnation=worker.incarnation,
                is_ready=worker.state == worker_pb2.WORKER_STATE_READY,
                capacity=worker.info.max_running,
                context_length=worker.info.context_length,
                busy=worker.load.running + worker.load.waiting,
            )
            for worker in response.workers
            if worker.state != worker_pb2.WORKER_STATE_LOST
        ]

    async def ready(self) -> list[Member]:
        """Workers that take work."""
        return [member for member in await self.members() if member.is_ready]

    async def require_idle(self, what: str) -> None:
        """States that all workers report no load soon.

        Raises:
            Mismatch: one still does.
        """

        async def is_idle() -> bool:
            return all(member.busy == 0 for member in await self.members())

        if not await within(REST_S, is_idle):
            busy = {member.name: member.busy for member in await self.members() if member.busy}
            raise Mismatch(f"{what}: after {REST_S:g} s workers still report {busy}")

    async def only_busy(self, limit_s: float) -> Member | None:
        """Waits until exactly one worker has exactly one execution; None when none shows it."""
        found: list[Member] = []

        async def is_found() -> bool:
            found[:] = [member for member in await self.members() if member.busy]
            return len(found) == 1 and found[0].busy == 1

        return found[0] if await within(limit_s, is_found) else None

    async def busy(self, count: int, limit_s: float) -> list[Member]:
        """Waits until at least that many workers have work; empty when they do not get it."""
        found: list[Member] = []

        async def is_found() -> bool:
            found[:] = [member for member in await self.members() if member.busy]
            return len(found) >= count

        return found if await within(limit_s, is_found) else []

    async def is_gone(self, member: Member, limit_s: float) -> bool:
        """Waits until this process of a worker is no longer listed."""

        async def is_gone() -> bool:
            return member.incarnation not in {item.incarnation for item in await self.members()}

        return await within(limit_s, is_gone)

    async def has_ready(self, count: int, limit_s: float) -> bool:
        """Waits until that many workers take work."""

        async def is_ready() -> bool:
            return len(await self.ready()) >= count

        return await within(limit_s, is_ready)


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key made for a test.

    Attributes:
        name: "apiKeys/{key}".
        secret: the credential.
    """

    name: str
    secret: str


class KeyDesk:
    """Makes and revokes keys as an administrator."""

    def __init__(self, channel: grpc.aio.Channel, administrator: Tenant, tenant: Tenant) -> None:
        self._administrator = administrator
        self._tenant = tenant
        self._keys = ApiKeyServiceStub(channel)
        self._tenants = TenancyServiceStub(channel)

    async def another(self) -> NewKey:
        """Makes one more key of the tenant's own project."""
        caller = await self._caller()
        return await self._create(caller.api_key.project)

    async def of_other_project(self) -> NewKey:
        """Makes a key of another project of the same payer."""
        caller = await self._caller()
        project = tenancy.CreateProjectRequest(
            project_id=OTHER_PROJECT, organization=caller.organization
        )
        await self._administrator.call(self._tenants.CreateProject, project)
        return await self._create(f"projects/{OTHER_PROJECT}")

    async def revoke(self, key: NewKey) -> None:
        """Revokes a key."""
        request = api_keys.RevokeApiKeyRequest(name=key.name)
        await self._administrator.call(self._keys.RevokeApiKey, request)

    async def _caller(self) -> api_keys.GetCallerInfoResponse:
        return await self._tenant.call(self._keys.GetCallerInfo, api_keys.GetCallerInfoRequest())

    async def _create(self, project: str) -> NewKey:
        request = api_keys.CreateApiKeyRequest(
            project=project, display_name="conformance", role=tenancy_pb2.ROLE_TENANT
        )
        made = await self._administrator.call(self._keys.CreateApiKey, request)
        return NewKey(made.api_key.name, made.secret)


class AdapterDesk:
    """Creates LoRA adapters as an administrator."""

    def __init__(self, channel: grpc.aio.Channel, administrator: Tenant) -> None:
        self._administrator = administrator
        self._stub = AdapterServiceStub(channel)

    async def create(self, adapter_id: str, adapter: model_pb2.Adapter) -> model_pb2.Adapter:
        """Creates an adapter.

        Raises:
            Refusal: its name has other content, or there is no such model version.
        """
        request = adapter_service_pb2.CreateAdapterRequest(adapter_id=adapter_id, adapter=adapter)
        response = await self._administrator.call(self._stub.CreateAdapter, request)
        return response.adapter


async def is_known(tenant: Tenant) -> bool:
    """Whether the gateway knows a tenant's key by now: a new one takes a moment to get around."""
    try:
        await tenant.cancel("none")
    except Refusal as refusal:
        return refusal.code is not Code.UNAUTHENTICATED
    return True


def rates_of(price: ledger_pb2.Price) -> Rates:
    """How a price makes counts a charge."""
    cached = price.cached_input_price_per_million.nanos
    reasoning = price.reasoning_price_per_million.nanos
    return Rates(
        input_price=price.input_price_per_million.nanos,
        output_price=price.output_price_per_million.nanos,
        cached_input_price=cached if price.HasField("cached_input_price_per_million") else None,
        reasoning_price=reasoning if price.HasField("reasoning_price_per_million") else None,
        request_price=price.request_price.nanos,
        background_discount_percent=price.background_discount_percent,
    )
