"""services/worker: every method against every kind of caller."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from libs.rpc.status import error_of
from libs.testing.rpc import ALLOWED, Kind, expected_outcome
from tests.integration.services.worker.harness import SERVICE, running_worker


@pytest.mark.parametrize("kind", Kind)
async def test_only_the_gateway_gets_in(kind: Kind) -> None:
    async with running_worker() as worker:
        credential = worker.callers.credential(kind, right="gateway", wrong="billing")

        got = {
            method.name: await outcome(worker.endpoint, method.name, credential)
            for method in SERVICE.methods
        }

        assert got == {method.name: expected_outcome(method, kind) for method in SERVICE.methods}


async def outcome(endpoint: str, method: str, credential: str | None) -> str:
    metadata = () if credential is None else (("authorization", f"Bearer {credential}"),)
    async with grpc.aio.insecure_channel(endpoint) as channel:
        # Every shape of method takes a stream with one message and gives one back, on the wire.
        opened: Any = channel.stream_stream(f"/{SERVICE.full_name}/{method}")
        call = opened(iter([b""]), metadata=metadata, timeout=5)
        try:
            await call.read()
        except grpc.aio.AioRpcError as failure:
            return error_of(failure).reason.value if failure.code() in REFUSED else ALLOWED
        finally:
            call.cancel()
    return ALLOWED


REFUSED = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}
