"""What a worker asks the catalog before it loads anything; a test speaks for the catalog."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from maas.catalog.v1 import model_pb2, model_service_pb2, model_service_pb2_grpc
from typing_extensions import override

from libs.errors import DeadlineExceeded, MaasError, not_found
from libs.process import StartError
from libs.rpc import Peer, Server
from libs.testing import FakeClock
from libs.testing.rpc import ANY_PORT, Callers, serving
from services.worker import versions
from services.worker.config import WorkerSection
from tests.integration.services.worker.harness import PATIENCE_S

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]

NAME = "models/tiny/versions/1"
DIGEST = "sha256:" + "ab" * 32
OTHER = "sha256:" + "cd" * 32


@dataclass
class Catalog(model_service_pb2_grpc.ModelServiceServicer):
    """Answers with a digest, or with the errors that it is given first."""

    digest: str = DIGEST
    errors: list[MaasError] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    @override
    async def LookUpModelVersion(
        self, request: model_service_pb2.LookUpModelVersionRequest, _: Context
    ) -> model_service_pb2.LookUpModelVersionResponse:
        self.asked.append(request.name)
        if self.errors:
            raise self.errors.pop(0)
        version = model_pb2.ModelVersion(name=request.name, digest=self.digest)
        return model_service_pb2.LookUpModelVersionResponse(model_version=version)


def catalog_of(digest: str = DIGEST, errors: Sequence[MaasError] = ()) -> Catalog:
    return Catalog(digest, list(errors))  # type: ignore[abstract]  # the worker calls one method


@asynccontextmanager
async def connected(catalog: Catalog, allowed: Sequence[str] = ("worker",)) -> AsyncIterator[Peer]:
    callers = Callers()
    server = Server(ANY_PORT, callers.identity({versions.METHOD: list(allowed)}))
    server.add(catalog, versions.SERVICES[0])
    async with (
        serving(server) as endpoint,
        Peer(endpoint, callers.tokens["worker"], versions.SERVICES) as peer,
    ):
        yield peer


def section(**fields: object) -> WorkerSection:
    values = {"name": "w1", "endpoint": "h:1", "model_version": NAME, "engine": "llamacpp"}
    return WorkerSection.model_validate({**values, "model_path": "m.gguf", **fields})


async def test_the_digest_of_the_catalog_is_what_has_to_be_loaded() -> None:
    catalog = catalog_of()
    async with connected(catalog) as peer:
        got = await versions.with_digest(section(), peer, FakeClock())

        assert got == section(digest=DIGEST)
        assert catalog.asked == [NAME]
        assert await versions.with_digest(got, peer, FakeClock()) == got


async def test_a_contradiction_is_refused_with_both_digests() -> None:
    async with connected(catalog_of()) as peer:
        with pytest.raises(StartError, match=f"{OTHER}.*{DIGEST}"):
            await versions.with_digest(section(digest=OTHER), peer, FakeClock())


async def test_a_version_without_a_digest_leaves_the_configuration_as_it_is() -> None:
    async with connected(catalog_of(digest="")) as peer:
        for wanted in (section(), section(digest=OTHER)):
            assert await versions.with_digest(wanted, peer, FakeClock()) == wanted


async def test_a_simulated_model_does_not_serve_under_the_name_of_weights() -> None:
    worker = section(engine="sim", model_path=None)
    async with connected(catalog_of()) as peer:
        with pytest.raises(StartError, match=r"worker\.engine"):
            await versions.with_digest(worker, peer, FakeClock())
    async with connected(catalog_of(digest="")) as peer:
        assert await versions.with_digest(worker, peer, FakeClock()) == worker


async def test_an_unknown_version_has_to_be_created_first() -> None:
    catalog = catalog_of(errors=[not_found(NAME)])
    async with connected(catalog) as peer:
        with pytest.raises(StartError, match="create the version first"):
            await versions.with_digest(section(), peer, FakeClock())


async def test_a_service_that_may_not_ask_is_told_where_that_is_said() -> None:
    async with connected(catalog_of(), allowed=["gateway"]) as peer:
        with pytest.raises(StartError, match=r"identity\.allow"):
            await versions.with_digest(section(), peer, FakeClock())


async def test_a_catalog_that_is_away_is_asked_again_but_not_for_ever() -> None:
    clock = FakeClock()
    catalog = catalog_of(errors=[DeadlineExceeded("not now")] * 3)
    async with connected(catalog) as peer:
        asking = asyncio.create_task(versions.with_digest(section(), peer, clock))
        await elapse_until_done(asking, clock)
        assert (await asking).digest == DIGEST

        catalog.errors = [DeadlineExceeded("not now")] * 1000
        start_s = clock.monotonic_s()
        asking = asyncio.create_task(versions.with_digest(section(), peer, clock))
        await elapse_until_done(asking, clock)
        with pytest.raises(StartError, match="did not answer within"):
            await asking
        assert clock.monotonic_s() - start_s <= versions.TRY_FOR_S


async def elapse_until_done(task: asyncio.Task[WorkerSection], clock: FakeClock) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not task.done():
            if clock.pending:
                clock.advance(0.2)
            await asyncio.sleep(0.001)
