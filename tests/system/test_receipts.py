"""A receipt from the last frame to the offline verifier, and an audit of the whole ledger."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import json_format
from maas.billing.v1 import audit_service_pb2, usage_service_pb2
from maas.billing.v1.audit_service_pb2_grpc import AuditServiceStub
from maas.billing.v1.usage_service_pb2_grpc import UsageServiceStub
from maas.inference.v1 import embedding_service_pb2
from maas.inference.v1.embedding_service_pb2_grpc import EmbeddingServiceStub

from libs.rpc import Peer
from tests.system.suite import Client, Suite, eventually_settled
from tools import verify
from tools.local.place import Ports, address

USAGE = usage_service_pb2.DESCRIPTOR.services_by_name["UsageService"]
AUDITS = audit_service_pb2.DESCRIPTOR.services_by_name["AuditService"]


async def test_receipt_of_the_last_frame_is_kept_and_verifies_offline(
    client: Client, tmp_path: Path
) -> None:
    """Signed by the gateway, accepted by billing, given out again, verified from files."""
    frames = await client.generate(max_output_tokens=20)
    finished = frames[-1].finished
    await eventually_settled(client)

    async with client.connect("billing", USAGE) as peer:
        stub = UsageServiceStub(peer.channel)
        generation_id = frames[0].started.generation_id
        kept = await peer.call(
            stub.GetReceipt, usage_service_pb2.GetReceiptRequest(generation_id=generation_id)
        )
        keys = await peer.call(stub.ListReceiptKeys, usage_service_pb2.ListReceiptKeysRequest())

    assert kept.receipt == finished.receipt
    (tmp_path / "receipt").write_text(json_format.MessageToJson(kept))
    (tmp_path / "keys").write_text(json_format.MessageToJson(keys))
    options = [str(tmp_path / "receipt"), "--keys", str(tmp_path / "keys")]
    assert verify.main(options) == verify.EXIT_OK
    (content,), _ = verify.verify_all([kept.receipt], verify.read_keys(tmp_path / "keys"))
    assert content.charge_nanos == finished.charge.nanos
    assert content.output_tokens == finished.usage.output_tokens == 20


async def test_receipt_of_an_embedding_is_kept_and_its_engine_time_stands_beside_it(
    client: Client,
) -> None:
    """Proven as any other charge; what the engine took is in the usage record."""
    service = embedding_service_pb2.DESCRIPTOR.services_by_name["EmbeddingService"]
    request = embedding_service_pb2.EmbedRequest(
        model=client.variables["MAAS_MODEL"],
        inputs=[embedding_service_pb2.EmbedInput(text="Once upon a time")],
    )
    endpoint = client.variables["MAAS_ENDPOINT"]
    async with Peer(endpoint, client.variables["MAAS_API_KEY"], [service]) as peer:
        made = await peer.call(EmbeddingServiceStub(peer.channel).Embed, request)
    await eventually_settled(client)

    async with client.connect("billing", USAGE) as peer:
        stub = UsageServiceStub(peer.channel)
        generation_id = made.generation_id
        kept = await peer.call(
            stub.GetReceipt, usage_service_pb2.GetReceiptRequest(generation_id=generation_id)
        )
        records = await peer.call(
            stub.ListUsageRecords,
            usage_service_pb2.ListUsageRecordsRequest(
                parent=client.variables["MAAS_ACCOUNT"], page_size=1000
            ),
        )

    assert made.receipt.signature
    assert kept.receipt == made.receipt
    (record,) = [item for item in records.usage_records if item.generation_id == generation_id]
    assert record.charge == made.charge
    assert record.engine_time.ToNanoseconds() > 0


async def test_nothing_is_broken(running_suite: Suite, client: Client) -> None:
    """Reconcile, at any moment and after whatever other tests have done to the suite."""
    await client.generate(max_output_tokens=5)
    endpoint = address(Ports(running_suite.base).of("billing"))

    async with (
        Peer(endpoint, client.variables["MAAS_ADMIN_KEY"], [AUDITS]) as peer,
        peer.stream(
            AuditServiceStub(peer.channel).Reconcile, audit_service_pb2.ReconcileRequest()
        ) as answers,
    ):
        (last,) = [answer async for answer in answers]

    assert last.summary.violation_count == 0
    # The credit that the seed gave, at least.
    assert last.summary.entry_count > 0
