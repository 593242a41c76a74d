"""What a feature's test works with: connections, the operator's view, and what it has shown."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Self

import grpc

from libs.errors import Code
from tools.conformance import operator
from tools.conformance.client import NARROW, Refusal, Tenant
from tools.conformance.deployment import Deployment
from tools.conformance.verdict import CannotShow, Findings

STREAMS_PER_CONNECTION = 64
KEY_KNOWN_S = 5.0
"""How long a new key may take to become known everywhere."""
WORKER_BACK_S = 60.0
"""How long a killed worker may take to be replaced."""
_OPTIONS = (
    # A connection of its own for each channel, so that one can be cut alone.
    ("grpc.use_local_subchannel_pool", 1),
    # What the library would repeat by itself is what is looked at here.
    ("grpc.enable_retries", 0),
    ("grpc.keepalive_time_ms", 30_000),
)


class Trial:
    """One feature on one deployment. An async context manager; closes its connections.

    Attributes:
        deployment: what is tested.
        findings: what was shown and what could not be.
        books: the tenant's money; None without billing's address.
        fleet: the workers; None without the scheduler's address or an administrator's key.
        desk: keys; None without auth's address or an administrator's key.
        adapters: LoRA adapters; None without catalog's address or an administrator's key.
    """

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.findings = Findings()
        self.books: operator.Books | None = None
        self.fleet: operator.Fleet | None = None
        self.desk: operator.KeyDesk | None = None
        self.adapters: operator.AdapterDesk | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        place = self.deployment
        own = place.api_key
        if place.billing is not None:
            channel = await self.connect(place.billing)
            self.books = operator.Books(channel, Tenant(channel, own, place.model))
        if place.scheduler is not None and place.admin_key is not None:
            channel = await self.connect(place.scheduler)
            self.fleet = operator.Fleet(channel, Tenant(channel, place.admin_key, place.model))
        if place.catalog is not None and place.admin_key is not None:
            channel = await self.connect(place.catalog)
            administrator = Tenant(channel, place.admin_key, place.model)
            self.adapters = operator.AdapterDesk(channel, administrator)
        if place.auth is not None and place.admin_key is not None:
            channel = await self.connect(place.auth)
            administrator = Tenant(channel, place.admin_key, place.model)
            self.desk = operator.KeyDesk(channel, administrator, Tenant(channel, own, place.model))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    def show(self, fact: str) -> None:
        """Notes a fact that was shown."""
        self.findings.shown.append(fact)

    def lack(self, part: str) -> None:
        """Notes a part that cannot be shown, and why."""
        self.findings.missing.append(part)

    def require_books(self) -> operator.Books:
        """The tenant's money.

        Raises:
            CannotShow: billing's address is missing.
        """
        if self.books is None:
            raise CannotShow("needs --billing")
        return self.books

    def require_fleet(self) -> operator.Fleet:
        """The workers.

        Raises:
            CannotShow: an address or the administrator's key is missing.
        """
        if self.fleet is None:
            raise CannotShow("needs --scheduler and --admin-key-file")
        return self.fleet

    def require_desk(self) -> operator.KeyDesk:
        """Keys.

        Raises:
            CannotShow: an address or the administrator's key is missing.
        """
        if self.desk is None:
            raise CannotShow("needs --admin-endpoint and --admin-key-file")
        return self.desk

    def require_adapters(self) -> operator.AdapterDesk:
        """LoRA adapters.

        Raises:
            CannotShow: an address or the administrator's key is missing.
        """
        if self.adapters is None:
            raise CannotShow("needs --catalog and --admin-key-file")
        return self.adapters

    @asynccontextmanager
    async def tenant(
        self, key: str | None = None, *, endpoint: str | None = None, is_narrow: bool = False
    ) -> AsyncIterator[Tenant]:
        """Connects to the gateway.

        Args:
            key: whose; None for the tenant's own.
            endpoint: where to; None for the gateway itself, else a relay in front of it.
            is_narrow: with a receive window of a few frames.
        """
        place = self.deployment
        channel = self._channel(endpoint or place.endpoint, is_narrow=is_narrow)
        async with channel:
            yield Tenant(channel, key or place.api_key, place.model)

    @asynccontextmanager
    async def tenants(self, streams: int, key: str | None = None) -> AsyncIterator[list[Tenant]]:
        """Connects often enough for that many streams; one entry for each stream."""
        async with AsyncExitStack() as stack:
            count = -(-streams // STREAMS_PER_CONNECTION)
            pool = [await stack.enter_async_context(self.tenant(key)) for _ in range(count)]
            yield [pool[number % count] for number in range(streams)]

    async def new_key(self, *, of_other_project: bool = False) -> operator.NewKey:
        """Makes a key that the gateway knows when this returns; revoked at the end."""
        desk = self.require_desk()
        key = await (desk.of_other_project() if of_other_project else desk.another())
        self._stack.push_async_callback(desk.revoke, key)
        async with self.tenant(key.secret) as tenant:
            if not await operator.within(KEY_KNOWN_S, lambda: operator.is_known(tenant)):
                raise CannotShow(f"a new key was not known after {KEY_KNOWN_S:g} s")
        return key

    async def known(self, tenant: Tenant, adapter: str) -> None:
        """Waits until the gateway knows an adapter that was just created.

        Raises:
            CannotShow: it does not in time.
        """
        spec = tenant.spec("x", 1, seed=0)
        spec.adapter = adapter

        async def is_known() -> bool:
            try:
                await tenant.count(spec)
            except Refusal as refusal:
                return refusal.code is not Code.NOT_FOUND
            return True

        if not await operator.within(KEY_KNOWN_S, is_known):
            raise CannotShow(f"a new adapter was not known after {KEY_KNOWN_S:g} s")

    async def require_ready_workers(self, count: int) -> operator.Fleet:
        """Waits for idle workers that a test may kill one of.

        Raises:
            CannotShow: there are not as many.
        """
        fleet = self.require_fleet()
        if not await fleet.has_ready(count, WORKER_BACK_S):
            raise CannotShow(f"needs {count} ready workers")
        await fleet.require_idle("before the test")
        return fleet

    async def connect(self, endpoint: str) -> grpc.aio.Channel:
        """Opens a connection that is closed with the trial."""
        channel = self._channel(endpoint)
        return await self._stack.enter_async_context(channel)

    def _channel(self, endpoint: str, *, is_narrow: bool = False) -> grpc.aio.Channel:
        options = [*_OPTIONS, *(NARROW if is_narrow else ())]
        certificates = self.deployment.certificates
        if certificates is None:
            return grpc.aio.insecure_channel(endpoint, options=options)
        # A relay has another address than the one that the certificate names.
        host = self.deployment.endpoint.rpartition(":")[0]
        if endpoint.startswith("127.0.0.1:"):
            options.append(("grpc.ssl_target_name_override", host))
        return grpc.aio.secure_channel(
            endpoint, grpc.ssl_channel_credentials(certificates), options=options
        )
