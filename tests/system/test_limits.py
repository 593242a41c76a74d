"""Limits, receipts and credit through the whole suite: gateway and billing agree."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from maas.billing.v1 import account_service_pb2 as accounts
from maas.billing.v1 import ledger_pb2
from maas.billing.v1 import limit_service_pb2 as limit_pb
from maas.billing.v1 import usage_service_pb2 as usage_pb
from maas.billing.v1.account_service_pb2_grpc import AccountServiceStub
from maas.billing.v1.limit_service_pb2_grpc import LimitServiceStub
from maas.billing.v1.usage_service_pb2_grpc import UsageServiceStub
from maas.common.v1 import money_pb2
from maas.inference.v1 import generation_pb2
from maas.inference.v1 import generation_service_pb2 as generations
from maas.inference.v1.generation_service_pb2_grpc import GenerationServiceStub

from libs.errors import MaasError, Reason
from libs.receipts import ReceiptKeys
from libs.rpc.status import error_of
from tests.system.suite import Client, Suite, eventually_settled
from tools.local.place import METRICS_OFFSET, Ports

PROMPT = list(range(1, 9))
RACERS = 256
AFFORDABLE = 7
ENGINE_BUSY = "maas_worker_engine_busy_seconds_total"
STREAM_S = 60.0
DAY_S = 86_400
LIMITS = limit_pb.DESCRIPTOR.services_by_name["LimitService"]
USAGE = usage_pb.DESCRIPTOR.services_by_name["UsageService"]
ACCOUNTS = accounts.DESCRIPTOR.services_by_name["AccountService"]


def spec_of(client: Client, output_tokens: int) -> generation_pb2.GenerationSpec:
    """Token ids, whose number is known to the token."""
    spec = generation_pb2.GenerationSpec(
        model=client.variables["MAAS_MODEL"],
        stop=generation_pb2.StopOptions(max_output_tokens=output_tokens, ignore_eos=True),
    )
    spec.tokens.ids.extend(PROMPT)
    return spec


class Caller:
    """Calls the gateway as the tenant."""

    def __init__(self, client: Client, channel: grpc.aio.Channel) -> None:
        self._client = client
        self.stub = GenerationServiceStub(channel)
        self.metadata = (("authorization", f"Bearer {client.variables['MAAS_API_KEY']}"),)

    async def generate(self, output_tokens: int, request_id: str = "") -> Any:
        """Generates.

        Raises:
            MaasError: what the gateway raised.
        """
        request = generations.GenerateRequest(
            spec=spec_of(self._client, output_tokens), request_id=request_id
        )
        try:
            answer = await self.stub.Generate(request, metadata=self.metadata, timeout=STREAM_S)
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure) from failure
        return answer.generation

    async def begin(self, output_tokens: int) -> Any:
        """Starts a stream; returns its call once it is accepted."""
        request = generations.StreamGenerateRequest(spec=spec_of(self._client, output_tokens))
        call = self.stub.StreamGenerate(request, metadata=self.metadata, timeout=STREAM_S)
        await call.read()
        return call

    async def refusal(self, output_tokens: int) -> MaasError:
        """Generates what has to be refused."""
        with pytest.raises(MaasError) as caught:
            await self.generate(output_tokens)
        return caught.value


@contextlib.asynccontextmanager
async def calling(client: Client) -> AsyncIterator[Caller]:
    """Connects to the gateway. What is refused stays refused."""
    options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(client.variables["MAAS_ENDPOINT"], options) as channel:
        yield Caller(client, channel)


@contextlib.asynccontextmanager
async def limited(client: Client, **kind: Any) -> AsyncIterator[str]:
    """Limits the tenant's account within the block; yields the limit's name."""
    account = client.variables["MAAS_ACCOUNT"]
    limit_id = f"test-{secrets.token_hex(6)}"
    limit = limit_pb.Limit(account=account, scope=account, **kind)
    async with client.connect("billing", LIMITS, key=client.variables["MAAS_ADMIN_KEY"]) as peer:
        stub = LimitServiceStub(peer.channel)
        request = limit_pb.CreateLimitRequest(limit_id=limit_id, limit=limit)
        made = await peer.call(stub.CreateLimit, request)
        try:
            yield made.limit.name
        finally:
            await peer.call(stub.DeleteLimit, limit_pb.DeleteLimitRequest(name=made.limit.name))


async def until_refused(caller: Caller, output_tokens: int) -> MaasError:
    """Waits until the gateway has heard of a limit."""
    async with asyncio.timeout(10):
        while True:
            try:
                # What is not refused at once is not refused.
                async with asyncio.timeout(0.2):
                    await caller.generate(output_tokens)
            except MaasError as error:
                return error
            except TimeoutError:
                pass


async def until_served(caller: Caller, output_tokens: int) -> None:
    """Waits until the gateway has heard that a limit is gone."""
    async with asyncio.timeout(5):
        while True:
            with contextlib.suppress(MaasError):
                await caller.generate(output_tokens)
                return
            await asyncio.sleep(0.02)


async def test_who_is_refused_by_a_rate_limit_comes_back_when_it_says(client: Client) -> None:
    rate = limit_pb.RateLimit(output_tokens_per_minute=1200)
    async with calling(client) as caller, limited(client, rate=rate) as name:
        larger = await until_refused(caller, 1201)
        assert larger.reason is Reason.LARGER_THAN_LIMIT
        # Holds what it may yet make; one token flows back every 50 ms.
        running = await caller.begin(1190)

        refused = await caller.refusal(30)

        assert refused.reason is Reason.RATE_LIMIT_REACHED
        assert refused.metadata == {"limit": name, "metric": "OUTPUT_TOKENS"}
        assert refused.retry_after_s is not None
        assert refused.retry_after_s < 1.5
        await asyncio.sleep(refused.retry_after_s)
        await caller.generate(30)
        running.cancel()


async def test_no_more_run_at_the_same_time_than_a_limit_allows(client: Client) -> None:
    rate = limit_pb.RateLimit(concurrent_generations=2)
    async with calling(client) as caller, limited(client, rate=rate):
        tasks = [asyncio.create_task(caller.generate(100)) for _ in range(6)]
        await asyncio.wait(tasks)
        # The first few may have come before the gateway had heard of the limit.
        tasks = [asyncio.create_task(caller.generate(100)) for _ in range(6)]
        ends = await asyncio.gather(*tasks, return_exceptions=True)

        refused = [end for end in ends if isinstance(end, MaasError)]
        assert len(refused) == 4
        assert {error.reason for error in refused} == {Reason.RATE_LIMIT_REACHED}


async def test_a_spend_limit_is_not_overshot(client: Client) -> None:
    amount = money_pb2.Money(currency_code="USD", nanos=1)
    spend = limit_pb.SpendLimit(amount=amount, window=limit_pb.SPEND_WINDOW_DAY)
    async with calling(client) as caller:
        async with limited(client, spend=spend) as name:
            refused = await until_refused(caller, 4)
            assert refused.reason is Reason.SPEND_LIMIT_REACHED
            assert refused.metadata["limit"] == name
        await until_served(caller, 4)


async def test_a_spend_limit_knows_what_was_spent_before_it_was_made(client: Client) -> None:
    amount = money_pb2.Money(currency_code="USD", nanos=2**62)
    spend = limit_pb.SpendLimit(amount=amount, window=limit_pb.SPEND_WINDOW_DAY)
    async with calling(client) as caller, client.connect("billing", USAGE, LIMITS) as peer:
        charge = (await caller.generate(4)).charge.nanos
        running = await caller.begin(3000)
        async with limited(client, spend=spend) as name:
            request = limit_pb.GetLimitRequest(name=name)
            made = (await peer.call(LimitServiceStub(peer.channel).GetLimit, request)).usage
            running.cancel()
            await eventually_settled(client)
            ended = (await peer.call(LimitServiceStub(peer.channel).GetLimit, request)).usage
        today = usage_pb.UsageFilter(end_time=ended.window_end_time)
        today.start_time.seconds = ended.window_end_time.seconds - DAY_S
        summarize = usage_pb.SummarizeUsageRequest(filter=today)
        summed = await peer.call(UsageServiceStub(peer.channel).SummarizeUsage, summarize)

    assert charge > 0
    assert made.held.nanos > 0, "what ran when the limit was made"
    assert ended.held.nanos == 0
    assert ended.spent.nanos == summed.summaries[0].charge.nanos > made.spent.nanos


async def test_racers_are_admitted_as_far_as_the_credit_goes(client: Client) -> None:
    async with contextlib.AsyncExitStack() as stack:
        # One connection takes 128 calls at a time.
        callers = [await stack.enter_async_context(calling(client)) for _ in range(4)]
        peer = await stack.enter_async_context(
            client.connect("billing", ACCOUNTS, key=client.variables["MAAS_ADMIN_KEY"])
        )
        stub = AccountServiceStub(peer.channel)

        async def adjust(nanos: int) -> None:
            request = accounts.PostEntryRequest(
                account=client.variables["MAAS_ACCOUNT"],
                request_id=secrets.token_hex(8),
                kind=ledger_pb2.ENTRY_KIND_ADJUSTMENT,
                amount=money_pb2.Money(currency_code="USD", nanos=nanos),
            )
            await peer.call(stub.PostEntry, request)

        quote = await callers[0].stub.QuoteGeneration(
            generations.QuoteGenerationRequest(spec=spec_of(client, 64)),
            metadata=callers[0].metadata,
        )
        await eventually_settled(client)
        surplus = (await client.balance()).available.nanos - AFFORDABLE * quote.hold.nanos
        await adjust(-surplus)
        try:
            ends = await asyncio.gather(
                *(callers[number % 4].generate(64) for number in range(RACERS)),
                return_exceptions=True,
            )
            await eventually_settled(client)
            left = (await client.balance()).available.nanos
        finally:
            await adjust(surplus)

        refused = [end for end in ends if isinstance(end, MaasError)]
        charged = sum(end.charge.nanos for end in ends if not isinstance(end, BaseException))
        assert left + charged == AFFORDABLE * quote.hold.nanos
        assert RACERS - len(refused) == AFFORDABLE
        assert {error.reason for error in refused} == {Reason.INSUFFICIENT_CREDIT}


async def test_the_receipt_and_the_engine_time_of_a_generation_are_kept(client: Client) -> None:
    request_id = secrets.token_hex(8)
    async with calling(client) as caller, client.connect("billing", USAGE) as peer:
        generation = await caller.generate(32, request_id)
        await eventually_settled(client)
        stub = UsageServiceStub(peer.channel)
        listed = await peer.call(stub.ListReceiptKeys, usage_pb.ListReceiptKeysRequest())
        keys = ReceiptKeys(key.public_key for key in listed.keys)
        signed = generation.receipt
        said = keys.verify(receipt=signed.receipt, key_id=signed.key_id, signature=signed.signature)
        assert (said.generation_id, said.request_id) == (generation.generation_id, request_id)
        assert said.charge_nanos == generation.charge.nanos

        kept = await peer.call(stub.GetReceipt, usage_pb.GetReceiptRequest(request_id=request_id))
        assert kept.receipt == signed
        records = await peer.call(
            stub.ListUsageRecords,
            usage_pb.ListUsageRecordsRequest(generation_id=generation.generation_id),
        )
        (record,) = records.usage_records
        engine_s = record.engine_time.ToNanoseconds() / 1e9
        assert 0 < engine_s <= generation.timings.total.ToNanoseconds() / 1e9


def busy_s(suite: Suite) -> float:
    """Seconds that the engines of a suite have worked, as its workers count them."""
    total = 0.0
    for name in suite.pids():
        if name.startswith("worker"):
            port = Ports(suite.base).of_process(name) + METRICS_OFFSET
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                text = answer.read().decode()
            found = re.search(rf"^{ENGINE_BUSY} (\S+)$", text, re.MULTILINE)
            assert found is not None
            total += float(found[1])
    return total


async def test_engine_times_sum_to_the_time_that_the_engines_worked(
    running_suite: Suite, client: Client
) -> None:
    async with calling(client) as caller, client.connect("billing", USAGE) as peer:
        await eventually_settled(client)
        before_s = await asyncio.to_thread(busy_s, running_suite)
        begun = Timestamp()
        begun.GetCurrentTime()
        await asyncio.gather(*(caller.generate(20 + number) for number in range(24)))
        # One that its client leaves says what it took, too.
        left = await caller.begin(400)
        await asyncio.sleep(0.3)
        left.cancel()
        await eventually_settled(client)
        after_s = await asyncio.to_thread(busy_s, running_suite)

        stub = UsageServiceStub(peer.channel)
        request = usage_pb.ListUsageRecordsRequest(
            page_size=1000,
            filter=usage_pb.UsageFilter(start_time=begun),
        )
        listed = await peer.call(stub.ListUsageRecords, request)
    taken_s = sum(item.engine_time.ToNanoseconds() / 1e9 for item in listed.usage_records)
    assert len(listed.usage_records) == 25
    assert taken_s == pytest.approx(after_s - before_s, rel=0.02)
