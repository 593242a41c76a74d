"""The token API from outside: what is refused, what is cancelled, what many streams pay."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from maas.auth.v1 import api_key_service_pb2 as api_keys
from maas.auth.v1 import tenancy_pb2
from maas.auth.v1 import tenancy_service_pb2 as tenancy
from maas.auth.v1.api_key_service_pb2_grpc import ApiKeyServiceStub
from maas.auth.v1.tenancy_service_pb2_grpc import TenancyServiceStub
from maas.billing.v1 import ledger_pb2, usage_service_pb2
from maas.billing.v1 import price_service_pb2 as prices
from maas.billing.v1.price_service_pb2_grpc import PriceServiceStub
from maas.billing.v1.usage_service_pb2_grpc import UsageServiceStub
from maas.catalog.v1 import model_pb2
from maas.catalog.v1 import model_service_pb2 as models
from maas.catalog.v1 import offering_service_pb2 as offerings
from maas.catalog.v1.model_service_pb2_grpc import ModelServiceStub
from maas.catalog.v1.offering_service_pb2_grpc import OfferingServiceStub
from maas.common.v1 import money_pb2
from maas.inference.v1 import generation_pb2
from maas.inference.v1 import generation_service_pb2 as generations
from maas.inference.v1.generation_service_pb2_grpc import GenerationServiceStub

from libs.errors import (
    Aborted,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    MaasError,
    NotFound,
    Reason,
    Unauthenticated,
)
from libs.rpc import Peer
from tests.system.suite import Client, Suite, eventually_settled

REVOKED_WITHIN_S = 2.0
NEXT_TOKEN_WITHIN_S = 0.2


@dataclass
class Received:
    """What a client saw of a stream."""

    generation_id: str = ""
    output_tokens: int = 0
    token_ids: int = 0
    charge: int | None = None
    is_in_order: bool = True


class TokenApi:
    """A tenant's client of the token API."""

    def __init__(self, peer: Peer, model: str) -> None:
        self._peer = peer
        self._stub = GenerationServiceStub(peer.channel)
        self.model = model

    def spec(
        self, text: str = "Once upon a time", max_output_tokens: int = 16
    ) -> generation_pb2.GenerationSpec:
        return generation_pb2.GenerationSpec(
            model=self.model,
            text=text,
            stop=generation_pb2.StopOptions(max_output_tokens=max_output_tokens, ignore_eos=True),
            output=generation_pb2.OutputOptions(return_token_ids=True),
        )

    async def stream(
        self,
        spec: generation_pb2.GenerationSpec,
        *,
        leave_at: int | None = None,
        when_started: Callable[[str], Awaitable[None]] | None = None,
    ) -> Received:
        received = Received()
        request = generations.StreamGenerateRequest(spec=spec)
        async with self._peer.stream(self._stub.StreamGenerate, request) as call:
            sequence = 0
            async for response in call:
                frame = response.frame
                sequence += 1
                received.is_in_order &= frame.sequence == sequence
                received.output_tokens = frame.output_tokens
                received.token_ids += sum(len(out.token_ids) for out in frame.delta.outputs)
                if frame.HasField("started"):
                    received.generation_id = frame.started.generation_id
                    if when_started is not None:
                        await when_started(received.generation_id)
                if frame.HasField("finished"):
                    received.charge = frame.finished.charge.nanos
                if leave_at is not None and received.output_tokens >= leave_at:
                    break
        return received

    async def cancel(self, generation_id: str) -> None:
        request = generations.CancelGenerationRequest(generation_id=generation_id)
        await self._peer.call(self._stub.CancelGeneration, request)

    async def generate(self, spec: generation_pb2.GenerationSpec, timeout_s: float) -> None:
        request = generations.GenerateRequest(spec=spec)
        await self._peer.call(self._stub.Generate, request, timeout_s=timeout_s)


@asynccontextmanager
async def token_api(client: Client, key: str | None = None) -> AsyncIterator[TokenApi]:
    descriptor = generations.DESCRIPTOR.services_by_name["GenerationService"]
    async with client.connect("gateway", descriptor, key=key) as peer:
        yield TokenApi(peer, client.variables["MAAS_MODEL"])


async def record_of(client: Client, generation_id: str) -> ledger_pb2.UsageRecord:
    """Waits for the settlement of a generation."""
    descriptor = usage_service_pb2.DESCRIPTOR.services_by_name["UsageService"]
    async with client.connect("billing", descriptor) as peer:
        stub = UsageServiceStub(peer.channel)
        request = usage_service_pb2.ListUsageRecordsRequest(generation_id=generation_id)
        for _ in range(50):
            response = await peer.call(stub.ListUsageRecords, request)
            if response.usage_records:
                (record,) = response.usage_records
                return record
            await asyncio.sleep(0.1)
    raise AssertionError(f"{generation_id} was not settled")


def _broken(api: TokenApi, name: str) -> generation_pb2.GenerationSpec:
    spec = api.spec()
    match name:
        case "empty prompt":
            spec.text = ""
        case "no input":
            spec.ClearField("text")
        case "prompt too long":
            spec.text = "fox " * 100_000
        case "max 0":
            spec.stop.max_output_tokens = 0
        case "max 2^31":
            spec.stop.max_output_tokens = 2**31
        case "max above the context":
            spec.stop.max_output_tokens = 1_000_000
        case "temperature NaN":
            spec.sampling.temperature = math.nan
        case "top_p 2":
            spec.sampling.top_p = 2
        case "token out of the vocabulary":
            spec.tokens.ids[:] = [1, 2, 2**31]
        case "stop sequence too long":
            spec.stop.stop_sequences[:] = ["x" * 300]
        case "chat without a role":
            spec.chat.messages.add().parts.add().text = "hello"
        case _:
            raise AssertionError(name)
    return spec


@pytest.mark.parametrize(
    ("name", "field", "reason"),
    [
        ("empty prompt", "spec.text", Reason.INVALID_FIELD),
        ("no input", "spec.input", Reason.INVALID_FIELD),
        ("prompt too long", "spec.text", Reason.CONTEXT_LENGTH_EXCEEDED),
        ("max 0", "spec.stop.max_output_tokens", Reason.INVALID_FIELD),
        ("max 2^31", "spec.stop.max_output_tokens", Reason.INVALID_FIELD),
        ("max above the context", "spec.stop.max_output_tokens", Reason.INVALID_FIELD),
        ("temperature NaN", "spec.sampling.temperature", Reason.INVALID_FIELD),
        ("top_p 2", "spec.sampling.top_p", Reason.INVALID_FIELD),
        ("token out of the vocabulary", "spec.tokens.ids[2]", Reason.INVALID_FIELD),
        ("stop sequence too long", "spec.stop.stop_sequences[0]", Reason.INVALID_FIELD),
        ("chat without a role", "spec.chat.messages[0].role", Reason.INVALID_FIELD),
    ],
)
async def test_bad_input_names_the_field_and_moves_no_money(
    client: Client, name: str, field: str, reason: Reason
) -> None:
    before = (await client.balance()).posted.nanos
    async with token_api(client) as api:
        with pytest.raises(InvalidArgument) as caught:
            await api.stream(_broken(api, name))

    assert caught.value.reason is reason
    assert [item.field for item in caught.value.violations] == [field]
    assert (await client.balance()).posted.nanos == before


async def test_unknown_model_and_wrong_keys_are_refused(client: Client) -> None:
    async with token_api(client) as api:
        api.model = "nope"
        with pytest.raises(NotFound) as missing:
            await api.stream(api.spec())
    good = client.variables["MAAS_API_KEY"]
    for key in ("mk_x", good[:-6] + "000000", good[:30] + "A" * (len(good) - 30)):
        async with token_api(client, key) as api:
            with pytest.raises(Unauthenticated):
                await api.stream(api.spec())
    async with token_api(client, client.variables["MAAS_ADMIN_KEY"]) as api:
        with pytest.raises(MaasError) as forbidden:
            await api.stream(api.spec())

    assert missing.value.metadata == {"resource": "offerings/nope"}
    assert forbidden.value.reason is Reason.PERMISSION_DENIED


async def test_a_tenant_without_money_is_refused_and_a_revoked_key_soon(client: Client) -> None:
    admin = client.variables["MAAS_ADMIN_KEY"]
    tenancy_service = tenancy.DESCRIPTOR.services_by_name["TenancyService"]
    key_service = api_keys.DESCRIPTOR.services_by_name["ApiKeyService"]
    async with client.connect("auth", tenancy_service, key_service, key=admin) as auth:
        tenants = TenancyServiceStub(auth.channel)
        keys = ApiKeyServiceStub(auth.channel)
        await auth.call(
            tenants.CreateOrganization, tenancy.CreateOrganizationRequest(organization_id="poor")
        )
        await auth.call(
            tenants.CreateProject,
            tenancy.CreateProjectRequest(project_id="poor", organization="organizations/poor"),
        )
        created = await auth.call(
            keys.CreateApiKey,
            api_keys.CreateApiKeyRequest(project="projects/poor", role=tenancy_pb2.ROLE_TENANT),
        )
        async with token_api(client, created.secret) as api:
            error = await _refusal(api, Unauthenticated)
            assert isinstance(error, FailedPrecondition)
            assert error.reason is Reason.INSUFFICIENT_CREDIT
            await auth.call(
                keys.RevokeApiKey, api_keys.RevokeApiKeyRequest(name=created.api_key.name)
            )
            error = await _refusal(api, FailedPrecondition)
            assert error.reason is Reason.CREDENTIALS_REVOKED


async def _refusal(
    api: TokenApi, unlike: type[MaasError], within_s: float = REVOKED_WITHIN_S
) -> MaasError:
    """Returns the refusal once it is no longer of the old kind; a change may take two seconds."""
    async with asyncio.timeout(within_s):
        while True:
            try:
                await api.stream(api.spec())
            except MaasError as error:
                if not isinstance(error, unlike):
                    return error
            await asyncio.sleep(0.02)


async def test_a_version_without_a_worker_is_refused_and_costs_nothing(client: Client) -> None:
    admin = client.variables["MAAS_ADMIN_KEY"]
    before = (await client.balance()).posted.nanos
    model_service = models.DESCRIPTOR.services_by_name["ModelService"]
    offering_service = offerings.DESCRIPTOR.services_by_name["OfferingService"]
    async with client.connect("catalog", model_service, offering_service, key=admin) as catalog:
        stub = ModelServiceStub(catalog.channel)
        await catalog.call(stub.CreateModel, models.CreateModelRequest(model_id="idle"))
        version = models.CreateModelVersionRequest(
            parent="models/idle",
            model_version_id="1",
            model_version=model_pb2.ModelVersion(context_length=100),
        )
        await catalog.call(stub.CreateModelVersion, version)
        offering = offerings.CreateOfferingRequest(
            offering_id="idle",
            offering=model_pb2.Offering(model_version="models/idle/versions/1"),
        )
        await catalog.call(OfferingServiceStub(catalog.channel).CreateOffering, offering)
    async with token_api(client) as api:
        api.model = "idle"
        unpriced = await _refusal(api, NotFound)
        await _price(client, "idle")
        # A scheduler that has just started waits some seconds for workers before it says so.
        refused = await _refusal(api, FailedPrecondition, within_s=10.0)

    assert unpriced.reason is Reason.PRICE_MISSING
    assert refused.reason is Reason.NO_READY_WORKER
    assert refused.metadata == {"modelVersion": "models/idle/versions/1"}
    assert (await client.balance()).posted.nanos == before


async def _price(client: Client, offering_id: str) -> None:
    """Gives an offering a price of nothing, as an operator would."""
    service = prices.DESCRIPTOR.services_by_name["PriceService"]
    free = money_pb2.Money(currency_code="USD", nanos=0)
    async with client.connect(
        "billing", service, key=client.variables["MAAS_ADMIN_KEY"]
    ) as billing:
        request = prices.CreatePriceRequest(
            price_id=offering_id,
            price=ledger_pb2.Price(
                offering=f"offerings/{offering_id}",
                input_price_per_million=free,
                output_price_per_million=free,
            ),
        )
        await billing.call(PriceServiceStub(billing.channel).CreatePrice, request)


async def test_64_streams_each_pay_what_they_received(client: Client) -> None:
    await eventually_settled(client)
    before = (await client.balance()).posted.nanos
    async with token_api(client) as api:
        everything = await asyncio.gather(
            *(api.stream(api.spec(max_output_tokens=20 + index)) for index in range(64))
        )

    for index, received in enumerate(everything):
        assert received.is_in_order
        assert received.output_tokens == received.token_ids == 20 + index
        record = await record_of(client, received.generation_id)
        assert record.usage.output_tokens == received.output_tokens
        assert record.charge.nanos == received.charge
    await eventually_settled(client)
    charges = sum(received.charge or 0 for received in everything)
    assert (await client.balance()).posted.nanos == before - charges


async def test_a_client_that_leaves_pays_for_what_was_released(client: Client) -> None:
    async with token_api(client) as api:
        received = await api.stream(api.spec(max_output_tokens=2000), leave_at=10)

    record = await record_of(client, received.generation_id)
    assert record.end_cause == ledger_pb2.END_CAUSE_CLIENT_CANCELLED
    assert 10 <= record.usage.output_tokens <= 10 + 64
    assert record.charge.nanos > 0


async def test_cancel_from_elsewhere_ends_the_stream_as_aborted(client: Client) -> None:
    async with token_api(client) as api, token_api(client) as other:
        started: list[str] = []

        async def cancel(generation_id: str) -> None:
            started.append(generation_id)
            await other.cancel(generation_id)

        with pytest.raises(Aborted) as caught:
            await api.stream(api.spec(max_output_tokens=5000), when_started=cancel)
        (generation_id,) = started
        # What has just ended may be stopped once more; what never was may not.
        await other.cancel(generation_id)
        with pytest.raises(NotFound):
            await other.cancel(generation_id[:-1] + "_")

    assert caught.value.reason is Reason.GENERATION_CANCELLED
    record = await record_of(client, generation_id)
    assert record.end_cause == ledger_pb2.END_CAUSE_CLIENT_CANCELLED


async def test_a_deadline_ends_the_generation(client: Client) -> None:
    async with token_api(client) as api:
        with pytest.raises(DeadlineExceeded):
            await api.generate(api.spec(max_output_tokens=8000), 0.5)
    await eventually_settled(client)


async def test_a_place_is_free_at_once_for_the_next(suite: Suite) -> None:
    """With room for one, a client that leaves makes room for the next within 200 ms."""
    suite.start("--capacity", "1")
    client = Client(suite)
    async with token_api(client) as api:
        await api.stream(api.spec(max_output_tokens=2000), leave_at=10)
        loop = asyncio.get_running_loop()
        started_s = loop.time()

        await api.stream(api.spec(max_output_tokens=5), leave_at=1)

        assert loop.time() - started_s < NEXT_TOKEN_WITHIN_S
    await eventually_settled(client)
