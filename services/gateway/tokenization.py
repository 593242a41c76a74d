"""Tokenizers of models, which are those of the workers that serve them. Free of charge."""

from __future__ import annotations

from maas.engine.v1 import engine_service_pb2
from maas.inference.v1 import tokenization_service_pb2

from libs.errors import FieldRule, invalid_field
from libs.rpc import Call
from services.gateway.inquiries import Inquirer
from services.gateway.quote import Quotes
from services.gateway.tables import Offerings
from services.gateway.turnstile import Turnstile

# Generated clients in every language refuse answers over 4 MiB by default; the rest is for what
# stands around the answer.
RESPONSE_BYTES_MAX = 4 * 1024 * 1024 - 1024


class Tokenization:
    """Counts, tokenizes and detokenizes."""

    def __init__(
        self, *, offerings: Offerings, inquirer: Inquirer, quotes: Quotes, turnstile: Turnstile
    ) -> None:
        """Keeps what it needs.

        Args:
            offerings: what tenants may call.
            inquirer: asks workers.
            quotes: counts what would be generated from.
            turnstile: bounds the calls in flight.
        """
        self._offerings = offerings
        self._inquirer = inquirer
        self._quotes = quotes
        self._turnstile = turnstile

    async def count(
        self, request: tokenization_service_pb2.CountTokensRequest, call: Call
    ) -> tokenization_service_pb2.CountTokensResponse:
        """Counts the tokens of a prompt.

        Args:
            request: the caller's.
            call: that asks.

        Raises:
            MaasError: it would not be generated from, or no worker answers.
        """
        sized = await self._quotes.size(request.spec, call)
        return tokenization_service_pb2.CountTokensResponse(
            input_tokens=sized.input_tokens, remaining_tokens=sized.remaining_tokens
        )

    async def tokenize(
        self, request: tokenization_service_pb2.TokenizeRequest, call: Call
    ) -> tokenization_service_pb2.TokenizeResponse:
        """Turns text into token ids.

        Args:
            request: the caller's.
            call: that asks.

        Raises:
            MaasError: it is refused, or no worker answers.
        """
        with self._turnstile.passing(f"projects/{call.require_principal().project}"):
            model_version = self._offerings.get(request.model).model_version
            adds = request.add_special_tokens if request.HasField("add_special_tokens") else True
            answer = await self._inquirer.ask(
                model_version,
                lambda stub: stub.Tokenize,
                engine_service_pb2.TokenizeRequest(
                    model_version=model_version,
                    text=request.text,
                    add_special_tokens=adds,
                    return_token_bytes=request.return_token_bytes,
                ),
                field="text",
                deadline_s=call.deadline_s,
            )
            # Both answers are the same on the wire. A million ids one by one would hold everybody
            # else up.
            wire = _within(answer.SerializeToString(), "text")
            return tokenization_service_pb2.TokenizeResponse.FromString(wire)

    async def detokenize(
        self, request: tokenization_service_pb2.DetokenizeRequest, call: Call
    ) -> tokenization_service_pb2.DetokenizeResponse:
        """Turns token ids into text.

        Args:
            request: the caller's.
            call: that asks.

        Raises:
            MaasError: it is refused, or no worker answers.
        """
        with self._turnstile.passing(f"projects/{call.require_principal().project}"):
            model_version = self._offerings.get(request.model).model_version
            answer = await self._inquirer.ask(
                model_version,
                lambda stub: stub.Detokenize,
                engine_service_pb2.DetokenizeRequest(
                    model_version=model_version, tokens=request.tokens
                ),
                field="tokens",
                deadline_s=call.deadline_s,
            )
            wire = _within(answer.SerializeToString(), "tokens.ids")
            return tokenization_service_pb2.DetokenizeResponse.FromString(wire)


def _within(wire: bytes, field: str) -> bytes:
    """Returns an answer that clients take.

    Raises:
        InvalidArgument: it is too large for them, by the fault of a field.
    """
    if len(wire) > RESPONSE_BYTES_MAX:
        raise invalid_field(
            field,
            FieldRule.TOO_LONG,
            f"the answer would be larger than {RESPONSE_BYTES_MAX} bytes: send it in parts",
        )
    return wire
