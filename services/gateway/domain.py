"""Rules of the gateway: what a request can cost at most, and who pays for which end.

Pure: no gRPC, no files, no clock.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from libs.errors import Reason
from libs.units import Nanos, Rates

# A tokenizer may put a beginning-of-sequence token and a space before plain text.
TEXT_OVERHEAD_TOKENS = 2
_PERCENT = 100


class EndCause(enum.Enum):
    """How a generation ended; the values are those of maas.billing.v1.EndCause."""

    COMPLETED = 1
    CLIENT_CANCELLED = 2
    DEADLINE = 3
    STALLED = 4
    REVOKED = 5
    WORKER_LOST = 11
    ENGINE_FAILURE = 12
    GATEWAY_LOST = 13

    @property
    def is_charged(self) -> bool:
        """Whether the client pays for what was released: not where the fault was ours."""
        return self in _CHARGED


_CHARGED = {
    EndCause.COMPLETED,
    EndCause.CLIENT_CANCELLED,
    EndCause.DEADLINE,
    EndCause.STALLED,
    EndCause.REVOKED,
}
_CAUSES = {
    Reason.WORKER_LOST: EndCause.WORKER_LOST,
    Reason.WORKER_DRAINING: EndCause.WORKER_LOST,
    Reason.ENGINE_FAILURE: EndCause.ENGINE_FAILURE,
    Reason.INTERNAL: EndCause.ENGINE_FAILURE,
    Reason.DEADLINE_EXCEEDED: EndCause.DEADLINE,
}


def cause_of(reason: Reason) -> EndCause:
    """Returns the cause of an end that a worker has reported. What nobody foresaw is our fault."""
    return _CAUSES.get(reason, EndCause.GATEWAY_LOST)


def is_movable(reason: Reason) -> bool:
    """Tells whether output can go on elsewhere: the worker is to blame, and not the request."""
    return reason in {Reason.WORKER_LOST, Reason.WORKER_DRAINING}


@dataclass(frozen=True, slots=True, kw_only=True)
class Offering:
    """What a tenant calls.

    Attributes:
        name: "offerings/{offering}".
        model_version: "models/{model}/versions/{version}".
        context_length: prompt and output together, tokens.
        default_max_output_tokens: when a request does not say.
        default_temperature: when a request does not say.
        default_top_p: when a request does not say.
        default_top_k: when a request does not say.
        prompt_overhead_tokens: most that the chat template adds to a prompt.
        message_overhead_tokens: most that it adds for each message.
    """

    name: str
    model_version: str
    context_length: int
    default_max_output_tokens: int
    default_temperature: float
    default_top_p: float
    default_top_k: int
    prompt_overhead_tokens: int
    message_overhead_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """A price of an offering.

    Attributes:
        name: "prices/{price}".
        offering: "offerings/{offering}".
        rates: what tokens and requests cost.
        effective_time: from when on it is in force.
    """

    name: str
    offering: str
    rates: Rates
    effective_time: datetime

    def charge(self, usage: Usage, *, is_background: bool) -> Nanos:
        """Prices what was released."""
        return self.rates.charge(
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cached_input_tokens=usage.cached_input_tokens,
            reasoning_tokens=usage.reasoning_tokens,
            is_background=is_background,
        )

    def affordable(
        self, *, nanos: int, input_tokens: int, at_most: int, is_background: bool
    ) -> int:
        """Returns how many output tokens an amount pays for beside the input, up to a number.

        Negative when the amount does not pay for the input.
        """
        tokens = self.rates.affordable(
            nanos=nanos, input_tokens=input_tokens, is_background=is_background
        )
        return at_most if tokens is None else min(tokens, at_most)

    def bound(self, nanos: int, *, is_background: bool) -> Bound:
        """Says a bound of a charge in the two prices that a worker knows of.

        What a worker ends by never costs more than the bound: the price of the request comes off
        first, output has the price of the dearest, and a discount that leaves parts of a nano per
        million tokens is rounded in our favour, which matters from some million tokens on.
        """
        rates = self.rates
        paid = _PERCENT - (rates.background_discount_percent if is_background else 0)
        request = rates.most(input_tokens=0, output_tokens=0, is_background=is_background)
        dearest = max(rates.output_price, rates.reasoning_price or 0)
        return Bound(
            nanos=nanos - request,
            input_price=-(-rates.input_price * paid // _PERCENT),
            output_price=-(-dearest * paid // _PERCENT),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A bound of a charge, for a worker.

    Attributes:
        nanos: for tokens; negative when the request alone costs more.
        input_price: nanos per million input tokens.
        output_price: nanos per million output tokens.
    """

    nanos: int
    input_price: int
    output_price: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSize:
    """What is known of a prompt before it is tokenised.

    Attributes:
        content_units: bytes of text, or token ids; no tokenizer makes more tokens than bytes.
        message_count: turns of a chat; 0 for text and token ids.
        tool_count: tools, and calls of tools in the turns: the template writes something around
            each of them, as around a turn.
        is_exact: nothing is added to it: token ids are the prompt.
    """

    content_units: int
    message_count: int
    tool_count: int = 0
    is_exact: bool = False


def prompt_bound(size: PromptSize, offering: Offering) -> int:
    """Bounds the tokens of a prompt: bytes plus what the template adds, within the context."""
    overhead = 0 if size.is_exact else TEXT_OVERHEAD_TOKENS
    if size.message_count:
        overhead += offering.prompt_overhead_tokens
        pieces = size.message_count + size.tool_count
        overhead += pieces * offering.message_overhead_tokens
    return min(size.content_units + overhead, offering.context_length)


def price_in_force(prices: list[Price], now: datetime) -> Price | None:
    """Returns the latest price that is in force at `now`; ties go to the greater name."""
    valid = [price for price in prices if price.effective_time <= now]
    return max(valid, key=lambda price: (price.effective_time, price.name), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Exact counts of one generation.

    Attributes:
        input_tokens: of the rendered prompt.
        output_tokens: released to the client.
        cached_input_tokens: the part of input_tokens that the prefix cache had.
        reasoning_tokens: the part of output_tokens that is reasoning.
    """

    input_tokens: int
    output_tokens: int
    cached_input_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        name: "adapters/{adapter}".
        model_version: "models/{model}/versions/{version}" that it was made for.
        path: of its file, relative to the directory of adapters that workers are given.
        digest: "sha256:<hex>" of the file.
        project: "projects/{project}" that alone may use it; empty for all.
    """

    name: str
    model_version: str
    path: str
    digest: str
    project: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What the journal keeps of an accepted generation: all that its settlement needs.

    Attributes:
        generation_id: dedup key of the settlement.
        slice_id: slice that it is held on.
        account: "accounts/{account}" that pays.
        project: "projects/{project}".
        api_key: "apiKeys/{key}".
        offering: "offerings/{offering}".
        model_version: "models/{model}/versions/{version}".
        price: "prices/{price}" frozen at admission.
        input_tokens: exact.
        start_time: admission, UTC.
        request_id: idempotency key; empty when there is none.
        request_sha256: hexadecimal digest of what was asked for, with request_id.
        labels: of the request.
        end_user: the caller's own id of whom the request was for.
        background: it runs in PRIORITY_CLASS_BACKGROUND, which may cost less.
    """

    generation_id: str
    slice_id: str
    account: str
    project: str
    api_key: str
    offering: str
    model_version: str
    price: str
    input_tokens: int
    start_time: datetime
    request_id: str = ""
    request_sha256: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    end_user: str = ""
    background: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Charged:
    """What billing has settled under an idempotency key, and charged.

    Attributes:
        generation_id: of the generation.
        request_sha256: hexadecimal digest of what was asked for.
        usage: counts.
        nanos: charge.
    """

    generation_id: str
    request_sha256: str
    usage: Usage
    nanos: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """How an accepted generation ended.

    Attributes:
        output_tokens: released.
        cause: decides who pays.
        end_time: UTC.
        cached_input_tokens: the part of the input that the prefix cache had.
        reasoning_tokens: the part of output_tokens that is reasoning.
        engine_time_ns: nanoseconds that workers said it took of their engines.
        receipt: a serialized SignedReceipt of it; empty for none.
    """

    output_tokens: int
    cause: EndCause
    end_time: datetime
    cached_input_tokens: int = 0
    reasoning_tokens: int = 0
    engine_time_ns: int = 0
    receipt: bytes = b""


def usage_of(opening: Opening, closing: Closing) -> Usage:
    """Returns the counts of a generation that has ended.

    No part is more than its whole: billing refuses such a record, and then nobody would ever pay.
    """
    return Usage(
        input_tokens=opening.input_tokens,
        output_tokens=closing.output_tokens,
        cached_input_tokens=min(closing.cached_input_tokens, opening.input_tokens),
        reasoning_tokens=min(closing.reasoning_tokens, closing.output_tokens),
    )
