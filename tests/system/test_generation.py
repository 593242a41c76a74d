"""A paid-for answer through the whole suite."""

from __future__ import annotations

import asyncio

from maas.billing.v1 import ledger_pb2, usage_service_pb2
from maas.billing.v1.usage_service_pb2_grpc import UsageServiceStub
from maas.engine.v1 import engine_pb2

from tests.system.suite import Client, Suite, eventually_settled, kill
from tools import seed
from tools.local.place import Ports
from tools.local.plan import Plan

POSTED_WITHIN_S = 1.0


async def usage_record(client: Client, generation_id: str) -> ledger_pb2.UsageRecord:
    """The one record of a generation."""
    service = usage_service_pb2.DESCRIPTOR.services_by_name["UsageService"]
    async with client.connect("billing", service) as peer:
        stub = UsageServiceStub(peer.channel)
        request = usage_service_pb2.ListUsageRecordsRequest(
            parent=client.variables["MAAS_ACCOUNT"], page_size=1000
        )
        response = await peer.call(stub.ListUsageRecords, request)
    (found,) = [item for item in response.usage_records if item.generation_id == generation_id]
    return found


async def test_stream_is_charged_exactly(client: Client) -> None:
    """Started, deltas, finished; the balance falls by the charge that finished names."""
    await eventually_settled(client)
    before = (await client.balance()).posted.nanos

    frames = await client.generate(max_output_tokens=20)

    kinds = [frame.WhichOneof("event") for frame in frames]
    assert (kinds[0], set(kinds[1:-1]), kinds[-1]) == ("started", {"delta"}, "finished")
    finished = frames[-1].finished
    assert finished.usage.output_tokens == 20
    await asyncio.sleep(POSTED_WITHIN_S)
    assert (await client.balance()).posted.nanos == before - finished.charge.nanos
    record = await usage_record(client, frames[0].started.generation_id)
    assert (record.usage, record.charge) == (finished.usage, finished.charge)
    await eventually_settled(client)


async def test_other_version_of_a_name_gets_an_offering_of_its_own(
    running_suite: Suite, client: Client
) -> None:
    """What tenants call never changes what it stands for."""
    plans = [
        Plan(
            port_base=running_suite.base,
            workers=1,
            gateway_names=["gateway"],
            model_id="story",
            version_id=version,
            digest=f"sha256:{version:0<64}",
            chat_template="",
        )
        for version in ("aaaaaaaaaaaa", "bbbbbbbbbbbb", "aaaaaaaaaaaa", "bbbbbbbbbbbb")
    ]
    info = engine_pb2.EngineInfo(context_length=512)

    async with seed.connect(
        Ports(running_suite.base), "catalog", client.variables["MAAS_ADMIN_KEY"]
    ) as catalog:
        got = [await seed.create_offering(catalog, plan, info) for plan in plans]

    assert got == ["offerings/story", "offerings/story-bbbbbb"] * 2


async def test_our_own_model_answers_and_survives_its_engine(suite: Suite) -> None:
    """The CPU engine: readable text, and a new engine after kill -9 of the old one."""
    suite.start("--engine", "llamacpp")
    client = Client(suite)
    frames = await client.generate("Once upon a time", max_output_tokens=24)
    text = "".join(
        output.text for frame in frames if frame.HasField("delta") for output in frame.delta.outputs
    )
    assert len(text.split()) > 8
    assert text.isprintable() or "\n" in text

    kill(suite.children("worker-1")[0])

    await client.whole_within(suite, 10)
    await eventually_settled(client)
