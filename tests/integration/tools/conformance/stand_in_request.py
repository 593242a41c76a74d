"""The stand-in for group `request`: all that may be asked for, wrong in one way at most."""

# ruff: noqa: N802 - the names of rpcs

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from maas.billing.v1 import ledger_pb2
from maas.billing.v1 import price_service_pb2 as prices
from maas.catalog.v1 import adapter_service_pb2 as adapters
from maas.catalog.v1 import model_pb2
from maas.common.v1 import usage_pb2
from maas.inference.v1 import embedding_service_pb2 as embeddings
from maas.inference.v1 import generation_pb2
from maas.inference.v1 import generation_service_pb2 as generations
from maas.inference.v1 import tokenization_service_pb2 as tokenization
from typing_extensions import override

from libs.errors import AlreadyExists, InvalidArgument, Reason
from tests.integration.tools.conformance import request_text
from tests.integration.tools.conformance.request_faults import Wrong
from tests.integration.tools.conformance.request_house import (
    CACHED_NANOS,
    MODEL,
    REFUSED_WITHIN_S,
    Asked,
    Made,
    RequestHouse,
)
from tests.integration.tools.conformance.request_model import (
    whole,
)
from tests.integration.tools.conformance.request_rules import (
    DIMENSIONS,
)
from tests.integration.tools.conformance.request_vectors import embed, tokens_of
from tests.integration.tools.conformance.running import INPUT_NANOS, OUTPUT_NANOS
from tests.integration.tools.conformance.serving import serving
from tests.integration.tools.conformance.stand_in import CONTEXT
from tools.conformance.deployment import AdapterFile, Deployment

VERSION = "models/m/versions/1"
_MILLION = 10**6
_ANSWER_BYTES_MAX = 3 * 1024 * 1024


class RequestStandIn(RequestHouse):
    """All services, with one fault at most."""

    # ---- the token API

    @override
    async def Generate(
        self, request: generations.GenerateRequest, context: Any
    ) -> generations.GenerateResponse:
        async with self.asking(request, context) as key:
            asked = self.ask(request, key)
            if self.wrong is Wrong.BAD_HARMS:
                # Long enough for others to come in between.
                await asyncio.sleep(0.1)
            made = self.make(asked)
            self.settle_request(asked, made)
            outputs = [whole(cut) for cut in self.deltas(asked, made, is_streamed=False)]
            if not asked.spec.output.return_token_ids:
                for output in outputs:
                    output.ClearField("token_ids")
            return generations.GenerateResponse(
                generation=generation_pb2.Generation(
                    generation_id=asked.identifier,
                    outputs=outputs,
                    prompt_scores=self.prompt_scores(asked),
                    usage=made.usage,
                    charge=self.usd(made.charge),
                )
            )
        raise AssertionError("refused")

    @override
    async def StreamGenerate(
        self, request: generations.StreamGenerateRequest, context: Any
    ) -> None:
        async with self.asking(request, context) as key:
            asked = self.ask(request, key)
            made = self.make(asked)
            loop = asyncio.get_running_loop()
            for number, frame in enumerate(self._frames(asked, made), start=1):
                frame.sequence = number
                wait_s = max(self.pace_s, self.held_until_s - loop.time())
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                if frame.HasField("finished"):
                    self.settle_request(asked, made)
                await context.write(generations.StreamGenerateResponse(frame=frame))

    def _frames(self, asked: Asked, made: Made) -> Iterator[generation_pb2.GenerationFrame]:
        started = generation_pb2.Started(
            generation_id=asked.identifier,
            input_tokens=made.usage.input_tokens,
            seed=asked.spec.sampling.seed,
        )
        yield generation_pb2.GenerationFrame(started=started)
        scores = self.prompt_scores(asked)
        if scores is not None and self.wrong is not Wrong.PROMPT_SCORES_UNSTREAMED:
            yield generation_pb2.GenerationFrame(prompt_scores=scores)
        tokens = 0
        # One step gives each output its next delta.
        for step in itertools.zip_longest(*self.deltas(asked, made, is_streamed=True)):
            outputs = [delta for delta in step if delta is not None]
            tokens += sum(len(delta.token_ids) for delta in outputs)
            if not asked.spec.output.return_token_ids:
                for delta in outputs:
                    delta.ClearField("token_ids")
            delta = generation_pb2.Delta(outputs=outputs)
            yield generation_pb2.GenerationFrame(delta=delta, output_tokens=tokens)
        finished = generation_pb2.Finished(usage=made.usage, charge=self.usd(made.charge))
        yield generation_pb2.GenerationFrame(finished=finished, output_tokens=tokens)

    async def GetCapabilities(
        self, request: generations.GetCapabilitiesRequest, context: Any
    ) -> generations.GetCapabilitiesResponse:
        async with self.asking(request, context):
            self.require_model(request.model)
            return generations.GetCapabilitiesResponse(
                offering=f"offerings/{MODEL}",
                model_version=VERSION,
                context_length=CONTEXT,
                capabilities=self.rules.able(),
            )
        raise AssertionError("refused")

    async def QuoteGeneration(
        self, request: generations.QuoteGenerationRequest, context: Any
    ) -> generations.QuoteGenerationResponse:
        async with self.asking(request, context) as key:
            asked = self.ask(request, key)
            spec, tokens = asked.spec, len(asked.prompt)
            count = max(spec.output.count, 1)
            most = 1
            if self.wrong is not Wrong.QUOTE_LOW:
                output = count * spec.stop.max_output_tokens
                most = tokens * INPUT_NANOS + output * OUTPUT_NANOS
            return generations.QuoteGenerationResponse(
                price="prices/p",
                input_tokens=tokens - (self.wrong is Wrong.QUOTE_OFF),
                max_output_tokens=spec.stop.max_output_tokens,
                count=count,
                most=self.usd(most),
                hold=self.usd(most + 1),
            )
        raise AssertionError("refused")

    # ---- tokens and vectors

    async def CountTokens(
        self, request: tokenization.CountTokensRequest, context: Any
    ) -> tokenization.CountTokensResponse:
        async with self.asking(request, context) as key:
            tokens = len(self.ask(request, key).prompt)
            return tokenization.CountTokensResponse(
                input_tokens=tokens - (self.wrong is Wrong.COUNT_OFF)
            )
        raise AssertionError("refused")

    async def Tokenize(
        self, request: tokenization.TokenizeRequest, context: Any
    ) -> tokenization.TokenizeResponse:
        async with self.asking(request, context):
            self.rules.check(request)
            is_control = self.wrong is Wrong.CONTROL_TYPED
            ids = request_text.encode(request.text, has_controls=is_control)
            is_first = not request.HasField("add_special_tokens") or request.add_special_tokens
            return tokenization.TokenizeResponse(
                token_ids=[request_text.BOS, *ids] if is_first else ids
            )
        raise AssertionError("refused")

    async def Detokenize(
        self, request: tokenization.DetokenizeRequest, context: Any
    ) -> tokenization.DetokenizeResponse:
        async with self.asking(request, context):
            self.rules.check(request)
            text, rest = request_text.decode(list(request.tokens.ids))
            if self.wrong is Wrong.DETOKENIZED_TRIMMED:
                text = text.strip()
            return tokenization.DetokenizeResponse(text=text, incomplete=rest)
        raise AssertionError("refused")

    async def Embed(
        self, request: embeddings.EmbedRequest, context: Any
    ) -> embeddings.EmbedResponse:
        async with self.asking(request, context):
            self.rules.check(request)
            self.require_model(request.model)
            self.rules.require(request, request.model, "")
            self.rules.require_vectors()
            size = 4 * DIMENSIONS * len(request.inputs)
            if size > _ANSWER_BYTES_MAX and self.wrong is not Wrong.LARGE_ANSWER:
                raise InvalidArgument("too large")
            tokens = sum(len(tokens_of(item, self.wrong)) for item in request.inputs)
            usage = usage_pb2.TokenUsage(input_tokens=tokens)
            usage.output_tokens = int(self.wrong is Wrong.EMBED_OUTPUT)
            charge = tokens * INPUT_NANOS
            self.posted -= charge * (2 if self.wrong is Wrong.EMBED_TWICE else 1)
            identifier = f"gen_{next(self.numbers)}"
            self.record(identifier, usage, charge, request)
            return embeddings.EmbedResponse(
                embeddings=embed(request, self.wrong),
                usage=usage,
                charge=self.usd(charge),
                generation_id=identifier,
            )
        raise AssertionError("refused")

    # ---- adapters and prices

    async def CreateAdapter(
        self, request: adapters.CreateAdapterRequest, context: Any
    ) -> adapters.CreateAdapterResponse:
        async with self.asking(request, context):
            made = model_pb2.Adapter()
            made.CopyFrom(request.adapter)
            made.name = f"adapters/{request.adapter_id}"
            known = self.adapters.setdefault(made.name, made)
            is_other = known != made and self.wrong is not Wrong.ADAPTER_REPLACED
            is_again = known is not made and self.wrong is Wrong.ADAPTER_AGAIN
            if is_other or is_again:
                raise AlreadyExists("other content", reason=Reason.RESOURCE_EXISTS)
            return adapters.CreateAdapterResponse(adapter=made)
        raise AssertionError("refused")

    async def GetPrice(
        self, request: prices.GetPriceRequest, _context: Any
    ) -> prices.GetPriceResponse:
        return prices.GetPriceResponse(
            price=ledger_pb2.Price(
                name=request.name,
                input_price_per_million=self.usd(INPUT_NANOS * _MILLION),
                cached_input_price_per_million=self.usd(CACHED_NANOS * _MILLION),
                output_price_per_million=self.usd(OUTPUT_NANOS * _MILLION),
            )
        )

    @override
    def deployment(self, endpoint: str) -> Deployment:
        """How the kit reaches it."""

        @asynccontextmanager
        async def disabled(flags: Sequence[str]) -> AsyncIterator[Deployment]:
            house = RequestStandIn(self.wrong, off=flags, accepted=self.rules.accepted)
            async with serving(house) as place:
                yield dataclasses.replace(place, disabled=None)

        return dataclasses.replace(
            super().deployment(endpoint),
            catalog=endpoint,
            refused_within_s=REFUSED_WITHIN_S,
            adapter=AdapterFile(adapter_id="a", path="a.gguf", digest=f"sha256:{1:064x}"),
            disabled=disabled,
        )
