"""libs/rpc/watch.py and key_watch.py: the client side of watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from maas.auth.v1 import key_table_service_pb2, key_table_service_pb2_grpc, tenancy_pb2
from maas.catalog.v1 import offering_service_pb2 as pb
from maas.catalog.v1 import offering_service_pb2_grpc
from typing_extensions import override

from libs.auth import KeyTable, new_key, sha256_of
from libs.errors import Unauthenticated, unavailable
from libs.process import Background
from libs.rpc import Peer, Server, follow
from libs.rpc import watch as watch_module
from libs.rpc.key_watch import SERVICES, follow_keys
from libs.testing import FakeClock, eventually
from libs.testing.rpc import ANY_PORT, serving
from tests.integration.libs.rpc.scripted import CALLERS, OFFERINGS, Reached

Response = pb.WatchOfferingsResponse
KEY = new_key(5, 5)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconnects at once. The constants are read when they are needed."""
    monkeypatch.setattr(watch_module, "BACKOFF_MIN_S", 0.001)
    monkeypatch.setattr(watch_module, "BACKOFF_MAX_S", 0.002)


class Follower:
    """Collects what `follow` hands over."""

    def __init__(self) -> None:
        self.got: list[tuple[bool, bool]] = []
        self._waiting: list[tuple[int, asyncio.Event]] = []

    def apply(self, response: Response, is_snapshot: bool) -> None:  # noqa: FBT001 - signature of follow
        self.got.append((response.snapshot_complete, is_snapshot))
        for count, event in self._waiting:
            if len(self.got) >= count:
                event.set()

    async def responses(self, count: int) -> list[tuple[bool, bool]]:
        event = asyncio.Event()
        self._waiting.append((count, event))
        if len(self.got) < count:
            async with asyncio.timeout(5):
                await event.wait()
        return self.got[:count]


async def following(scripted: Reached, use: Callable[[Follower], Any]) -> Any:
    follower = Follower()
    async with (
        Peer(scripted.endpoint, CALLERS.tokens["gateway"], [OFFERINGS]) as peer,
        Background() as background,
    ):
        stub = offering_service_pb2_grpc.OfferingServiceStub(peer.channel)
        watching = follow(peer, stub.WatchOfferings, pb.WatchOfferingsRequest(), follower.apply)
        background.start(watching, name="follow")
        return await use(follower)


async def test_first_listing_is_told_from_changes(scripted: Reached) -> None:
    async def behave(_: Any) -> AsyncIterator[Response]:
        yield Response()
        yield Response(snapshot_complete=True)
        yield Response()
        await asyncio.Event().wait()

    scripted.servicer.watch = behave
    got = await following(scripted, lambda follower: follower.responses(3))

    assert got == [(False, True), (True, True), (False, False)]


async def test_watch_that_ends_or_fails_starts_again_with_a_listing(scripted: Reached) -> None:
    async def behave(_: Any) -> AsyncIterator[Response]:
        yield Response(snapshot_complete=True)
        if scripted.servicer.calls == 1:
            raise unavailable("postgresql")
        if scripted.servicer.calls == 2:
            return
        await asyncio.Event().wait()

    scripted.servicer.watch = behave
    got = await following(scripted, lambda follower: follower.responses(3))

    assert got == [(True, True)] * 3
    assert scripted.servicer.calls == 3


async def test_each_new_stream_is_told_before_what_it_says(scripted: Reached) -> None:
    said: list[str] = []

    async def behave(_: Any) -> AsyncIterator[Response]:
        yield Response()
        if scripted.servicer.calls == 1:
            raise unavailable("postgresql")
        yield Response(snapshot_complete=True)
        await asyncio.Event().wait()

    scripted.servicer.watch = behave
    async with (
        Peer(scripted.endpoint, CALLERS.tokens["gateway"], [OFFERINGS]) as peer,
        Background() as background,
    ):
        watching = follow(
            peer,
            offering_service_pb2_grpc.OfferingServiceStub(peer.channel).WatchOfferings,
            pb.WatchOfferingsRequest(),
            lambda *_: said.append("response"),
            on_open=lambda: said.append("open"),
        )
        background.start(watching, name="follow")
        await eventually(lambda: len(said) == 5)

    assert said == ["open", "response", "open", "response", "response"]


async def test_silent_watch_starts_again(
    scripted: Reached, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "WATCH_SILENCE_MAX_S", 0.03)

    async def behave(_: Any) -> AsyncIterator[Response]:
        yield Response(snapshot_complete=True)
        await asyncio.Event().wait()

    scripted.servicer.watch = behave
    got = await following(scripted, lambda follower: follower.responses(2))

    assert got == [(True, True)] * 2


class KeyTableScript(key_table_service_pb2_grpc.KeyTableServiceServicer):
    """Sends two keys: one of a known role, one of a role that a later build knows."""

    @override
    async def WatchKeys(self, _request: Any, _: Any) -> Any:
        def record(secret: str, role: int) -> key_table_service_pb2.KeyRecord:
            return key_table_service_pb2.KeyRecord(
                key_id=secret.split("_")[1],
                secret_sha256=sha256_of(secret),
                role=role,  # type: ignore[arg-type] # any number travels
                state=tenancy_pb2.API_KEY_STATE_ACTIVE,
                project="projects/demo",
                organization="organizations/acme",
                revision=1,
            )

        yield key_table_service_pb2.WatchKeysResponse(
            keys=[record(KEY.secret, tenancy_pb2.ROLE_TENANT), record(CALLERS.stranger, 99)],
            snapshot_complete=True,
        )
        await asyncio.Event().wait()


async def test_key_table_follows_and_leaves_out_roles_it_does_not_know() -> None:
    method = "maas.auth.v1.KeyTableService/WatchKeys"
    server = Server(ANY_PORT, CALLERS.identity({method: ["gateway"]}))
    server.add(KeyTableScript(), SERVICES[0])
    table, clock = KeyTable(), FakeClock()
    async with (
        serving(server) as endpoint,
        Peer(endpoint, CALLERS.tokens["gateway"], SERVICES) as peer,
        Background() as background,
    ):
        background.start(follow_keys(peer, table, clock), name="follow keys")
        await eventually(lambda: table.age_s(clock.monotonic_s()) is not None)

        principal = table.authenticate(KEY.secret, clock.monotonic_s())
        assert (principal.project, principal.organization) == ("demo", "acme")
        with pytest.raises(Unauthenticated):
            table.authenticate(CALLERS.stranger, clock.monotonic_s())
