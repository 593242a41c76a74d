"""What a generation would take, and what an offering can do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from maas.common.v1 import capabilities_pb2, money_pb2
from maas.inference.v1 import generation_pb2, generation_service_pb2, tokenization_service_pb2

from libs.errors import InvalidArgument, MaasError, NotFound, Reason
from tests.integration.services.gateway.client_unary import Asker, answer, text_spec
from tests.integration.services.gateway.harness import gateway
from tests.integration.services.gateway.neighbours import NANOS_PER_TOKEN, VERSION
from tests.integration.services.gateway.neighbours_unary import abilities

Quote = generation_service_pb2.QuoteGenerationRequest
Capabilities = generation_service_pb2.GetCapabilitiesRequest
Spec = generation_pb2.GenerationSpec


async def test_a_quote_says_the_exact_prompt_and_the_most_that_it_can_cost(
    tmp_path: Path,
) -> None:
    async with gateway(tmp_path, capabilities=abilities()) as world, Asker(world.endpoint) as asker:
        spec = text_spec("hello", most=100)
        spec.output.count = 3

        said = await asker.call(asker.generations.QuoteGeneration, Quote(spec=spec))

        assert (said.offering, said.model_version) == ("offerings/m", VERSION)
        assert said.price == "prices/p"
        assert (said.input_tokens, said.max_output_tokens, said.count) == (6, 100, 3)
        assert said.most == money_pb2.Money(
            currency_code="USD", nanos=(6 + 3 * 100) * NANOS_PER_TOKEN
        )
        # Before the prompt is counted: its bytes and two more.
        assert said.hold.nanos == (5 + 2 + 3 * 100) * NANOS_PER_TOKEN
        await world.no_settlement()
        assert world.workers[0].requests.empty()


async def test_defaults_are_quoted_where_the_request_says_nothing(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world, Asker(world.endpoint) as asker:
        said = await asker.call(
            asker.generations.QuoteGeneration, Quote(spec=Spec(model="offerings/m", text="hello"))
        )

        assert (said.max_output_tokens, said.count) == (512, 1)


async def test_a_limit_on_the_charge_bounds_the_quote(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world, Asker(world.endpoint) as asker:
        spec = text_spec("hello", most=100)
        spec.max_charge.CopyFrom(money_pb2.Money(currency_code="USD", nanos=20 * NANOS_PER_TOKEN))

        said = await asker.call(asker.generations.QuoteGeneration, Quote(spec=spec))

        assert said.most.nanos == said.hold.nanos == 20 * NANOS_PER_TOKEN
        # The worker can tell whether the prompt leaves room below it.
        (asked,) = world.workers[0].asked
        assert asked.execution.charge_limit.nanos == 20 * NANOS_PER_TOKEN


@pytest.mark.parametrize("short", [0, 1])
async def test_what_is_quoted_to_be_held_is_what_admission_holds(
    tmp_path: Path, short: int
) -> None:
    spec = text_spec("hello", most=100)
    hold = (5 + 2 + 100) * NANOS_PER_TOKEN
    async with gateway(tmp_path, available=hold - short) as world, Asker(world.endpoint) as asker:
        said = await asker.call(asker.generations.QuoteGeneration, Quote(spec=spec))
        assert said.hold.nanos == hold

        generating = asker.begin(
            asker.generations.Generate, generation_service_pb2.GenerateRequest(spec=spec)
        )
        if short:
            with pytest.raises(MaasError) as caught:
                await answer(generating)
            assert caught.value.reason is Reason.INSUFFICIENT_CREDIT
        else:
            execution = await world.accepted(input_tokens=6)
            world.workers[0].end(execution.lane)
            assert (await answer(generating)).generation.usage.input_tokens == 6


async def test_the_worker_checks_all_of_what_would_run(tmp_path: Path) -> None:
    async with gateway(tmp_path, capabilities=abilities()) as world, Asker(world.endpoint) as asker:
        spec = Spec(model="m")
        spec.chat.messages.add(role=generation_pb2.ROLE_USER).parts.add(text="hi")
        spec.sampling.min_p = 0.25
        spec.output.count = 3

        said = await asker.call(asker.generations.QuoteGeneration, Quote(spec=spec))

        assert said.input_tokens == 5
        execution = world.workers[0].asked[0].execution
        assert execution.chat == spec.chat
        assert (execution.sampling.min_p, execution.sampling.temperature) == (0.25, 1.0)
        assert (execution.output.count, execution.stop.max_output_tokens) == (3, 512)
        assert len({execution.lane, *execution.more_lanes}) == 3


def _with(spec: Spec, **fields: object) -> Spec:
    changed = Spec()
    changed.CopyFrom(spec)
    for path, value in fields.items():
        target = changed
        *parents, name = path.split("__")
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, name, value)
    return changed


def _long_duration() -> Spec:
    spec = text_spec()
    spec.max_duration.CopyFrom(Duration(seconds=100_000))
    return spec


def _tools_without_chat() -> Spec:
    spec = text_spec()
    spec.tools.tools.add(name="f")
    return spec


@pytest.mark.parametrize(
    "spec",
    [
        Spec(model="m"),
        _with(text_spec(), model="other"),
        _with(text_spec(), stop__max_output_tokens=5000),
        _with(text_spec(most=5), stop__min_output_tokens=6),
        _with(text_spec(), output__top_logprobs=2),
        _with(text_spec(), output__return_logprobs=True),
        _with(text_spec(), output__count=5),
        _with(text_spec(), sampling__frequency_penalty=1.0),
        _with(text_spec(), adapter="adapters/mine"),
        _with(text_spec(), max_charge__nanos=5, max_charge__currency_code="EUR"),
        _with(text_spec(), max_charge__nanos=0, max_charge__currency_code="USD"),
        _tools_without_chat(),
        _long_duration(),
    ],
)
async def test_what_would_be_refused_is_neither_quoted_nor_counted(
    tmp_path: Path, spec: Spec
) -> None:
    async with gateway(tmp_path, capabilities=abilities()) as world, Asker(world.endpoint) as asker:
        world.offerings.complete()
        world.adapters.complete()

        refusals = [
            await asker.refusal(
                asker.generations.Generate, generation_service_pb2.GenerateRequest(spec=spec)
            ),
            await asker.refusal(asker.generations.QuoteGeneration, Quote(spec=spec)),
            await asker.refusal(
                asker.tokens.CountTokens, tokenization_service_pb2.CountTokensRequest(spec=spec)
            ),
        ]

        assert isinstance(refusals[0], InvalidArgument | NotFound)
        said = {
            (error.code, error.reason, error.message, error.violations, str(error.metadata))
            for error in refusals
        }
        assert len(said) == 1
        assert world.workers[0].asked == []


async def test_an_offering_can_do_what_all_of_its_workers_can(tmp_path: Path) -> None:
    async with (
        gateway(tmp_path, worker_count=2, capabilities=abilities()) as world,
        Asker(world.endpoint) as asker,
    ):
        ask = asker.generations.GetCapabilities
        both = await asker.call(ask, Capabilities(model="m"))
        known = world.table.find("workers/w1")
        assert known is not None
        less = capabilities_pb2.Capabilities(chat=True, max_outputs=2, regex=True)
        world.table.put(dataclasses.replace(known, capabilities=less))
        shared = await asker.call(ask, Capabilities(model="offerings/m"))

        assert (both.offering, both.model_version) == ("offerings/m", VERSION)
        assert both.context_length == 1000
        assert both.capabilities == abilities()
        assert shared.capabilities == capabilities_pb2.Capabilities(chat=True, max_outputs=2)


async def test_an_offering_without_workers_can_do_nothing_now(tmp_path: Path) -> None:
    async with gateway(tmp_path, capabilities=abilities()) as world, Asker(world.endpoint) as asker:
        world.offerings.complete()
        world.table.complete()
        ask = asker.generations.GetCapabilities
        world.table.drop("workers/w0")

        nobody = await asker.refusal(ask, Capabilities(model="m"))
        quote = await asker.refusal(asker.generations.QuoteGeneration, Quote(spec=text_spec()))
        unknown = await asker.refusal(ask, Capabilities(model="other"))

        assert nobody.reason is quote.reason is Reason.NO_READY_WORKER
        assert nobody.metadata == {"modelVersion": VERSION}
        assert isinstance(unknown, NotFound)
