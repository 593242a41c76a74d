"""Who gets past the door of each method."""

from __future__ import annotations

import pytest
from maas.scheduler.v1 import worker_registry_service_pb2_grpc

from libs.errors import MaasError
from libs.rpc import Peer
from libs.testing.rpc import ALLOWED, Kind, expected_outcome, outcomes
from tests.integration.services.scheduler.harness import (
    PLACEMENT,
    REGISTRY,
    WORKERS,
    Running,
    WorkerStream,
    register,
)


@pytest.mark.parametrize("kind", Kind)
async def test_each_method_lets_in_its_own_callers(suite: Running, kind: Kind) -> None:
    credential = suite.callers.credential(kind, right="gateway", wrong="billing")

    got = await outcomes(suite.endpoint, [PLACEMENT, WORKERS], credential)

    assert got == {method: expected_outcome(method, kind) for method in got}


@pytest.mark.parametrize("kind", Kind)
async def test_only_workers_may_register(suite: Running, kind: Kind) -> None:
    """A gateway is no worker either: its token is the wrong one here."""
    credential = suite.callers.credential(kind, right="worker", wrong="gateway")
    (method,) = REGISTRY.methods

    assert await _connect(suite, credential) == expected_outcome(method, kind)


async def _connect(suite: Running, credential: str | None) -> str:
    async with Peer(suite.endpoint, credential or "", [REGISTRY]) as peer:
        if credential is None:
            peer._metadata = ()  # type: ignore[assignment]  # nobody has no metadata
        stub = worker_registry_service_pb2_grpc.WorkerRegistryServiceStub(peer.channel)
        try:
            async with peer.both_ways(stub.Connect) as call:
                await WorkerStream(call).register(register())
        except MaasError as error:
            return error.reason.value
    return ALLOWED
