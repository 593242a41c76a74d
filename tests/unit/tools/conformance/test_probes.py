"""What the kit asks for, against what the contract makes depend on a flag."""

from __future__ import annotations

import grpc
from maas.common.v1 import capabilities_pb2
from maas.inference.v1 import embedding_service_pb2, generation_pb2

from libs import capabilities
from libs.capabilities import FLAGS, needs
from libs.errors import InvalidArgument, Reason
from tools.conformance.client import Tenant
from tools.conformance.probes import PROBES
from tools.conformance.requests import Request, matches


async def asked() -> list[tuple[str, str, Request]]:
    """Flag, path and request of everything that is asked for."""
    found: list[tuple[str, str, Request]] = []
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        tenant = Tenant(channel, "key", "model")
        for flag, probe in PROBES.items():
            if probe.make is not None:
                found.append((flag, probe.path, probe.make(tenant, 1)))
            found += [(flag, path, make(tenant)) for path, make in probe.also.items()]
    return found


async def test_every_field_that_needs_a_flag_is_asked_for() -> None:
    spec = needs(generation_pb2.GenerationSpec.DESCRIPTOR)
    wanted = {(need.flag, f"spec.{need.path.replace('[]', '[0]')}") for need in spec}
    wanted |= {
        (need.flag, need.path) for need in needs(embedding_service_pb2.EmbedRequest.DESCRIPTOR)
    }

    assert wanted <= {(flag, path) for flag, path, _ in await asked()}


async def test_request_asks_for_what_its_flag_and_those_above_it_allow() -> None:
    for flag, path, request in await asked():
        able = capabilities_pb2.Capabilities()
        for name in (flag, *PROBES[flag].under):
            setattr(able, name, 1)

        capabilities.require(request, able, model="m", prefix="")

        if path == "model" or flag == "max_outputs":
            # Not of a field, and one output is always allowed.
            continue
        setattr(able, flag, 0)
        prefix = "spec" if isinstance(request, generation_pb2.GenerationSpec) else ""
        error = refusal(request, able, prefix)
        assert error.reason is Reason.FEATURE_UNSUPPORTED
        assert [item.field for item in error.violations] == [path]


def refusal(request: Request, able: capabilities_pb2.Capabilities, prefix: str) -> InvalidArgument:
    try:
        capabilities.require(request, able, model="m", prefix=prefix)
    except InvalidArgument as error:
        return error
    raise AssertionError(request.DESCRIPTOR.name)


def test_every_flag_has_a_probe() -> None:
    assert set(PROBES) == set(FLAGS)


def test_output_is_held_against_its_schema() -> None:
    schema = {"type": "object", "required": ["a"]}

    assert matches('{"a": 1}', schema)
    assert not matches('{"b": 1}', schema)
    assert not matches('{"a": 1', schema)
    assert not matches("[" * 100_000, schema)
