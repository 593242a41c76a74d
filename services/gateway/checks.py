"""What can be said of a request before anything is held or asked: is it right, can it be served?

In order: the rules between its fields, the offering, what its workers can do, the adapter, the
price, and the most that it can cost. All from tables that watches keep fresh; nobody is waited for.
"""

from __future__ import annotations

from dataclasses import dataclass

from maas.common.v1.capabilities_pb2 import Capabilities
from maas.inference.v1 import generation_pb2, tools_pb2

from libs import capabilities
from libs.clock import Clock
from libs.errors import (
    FieldRule,
    InvalidArgument,
    Reason,
    Violation,
    invalid_field,
    unsupported,
)
from libs.units import CURRENCY
from services.gateway import spec_rules
from services.gateway.domain import Adapter, Offering, Price, prompt_bound
from services.gateway.prompt_size import prompt_size
from services.gateway.tables import Adapters, Offerings, Prices, Workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A request that can be served, as far as is known.

    Attributes:
        offering: that is called.
        price: in force now.
        adapter: to apply; None for none.
        may_reason: a worker may split reasoning from the text, be it asked to or not.
        count: outputs.
        max_output_tokens: most tokens of each output.
        input_bound: most tokens that the prompt can have.
        is_input_exact: it has as many, and not only at most.
        is_background: it runs when nothing else waits, and may cost less.
        most: nanos that it can cost at most: what is held for it.
    """

    offering: Offering
    price: Price
    adapter: Adapter | None
    may_reason: bool
    count: int
    max_output_tokens: int
    input_bound: int
    is_input_exact: bool
    is_background: bool
    most: int


class Checks:
    """Checks requests."""

    def __init__(
        self,
        *,
        offerings: Offerings,
        prices: Prices,
        adapters: Adapters,
        workers: Workers,
        clock: Clock,
    ) -> None:
        self._offerings = offerings
        self._prices = prices
        self._adapters = adapters
        self._workers = workers
        self._clock = clock

    def check(self, spec: generation_pb2.GenerationSpec, project: str) -> Checked:
        """Checks a request.

        Args:
            spec: what is asked for; within the limits of its fields.
            project: "projects/{project}" that asks.

        Raises:
            InvalidArgument: a rule is broken, or the model cannot do it (FEATURE_UNSUPPORTED).
            NotFound: there is no such offering, or no such adapter for this project.
            FailedPrecondition: PRICE_MISSING.
            Unavailable: a table was never complete.
        """
        spec_rules.check(spec)
        offering = self._offerings.get(spec.model)
        able = self._workers.capabilities_of(offering.model_version)
        if able is not None:
            # Without workers the placement says what is to be said.
            _require(spec, able, offering.name)
        adapter = self._adapter(spec, offering, project) if spec.adapter else None
        price = self._prices.get(offering.name, self._clock.now())
        is_background = spec.priority == generation_pb2.PRIORITY_CLASS_BACKGROUND
        max_output_tokens = _max_output_tokens(spec, offering)
        count = spec_rules.count_of(spec)
        size = prompt_size(spec, offering.context_length)
        input_bound = prompt_bound(size, offering)
        most: int = price.rates.most(
            input_tokens=input_bound,
            output_tokens=count * max_output_tokens,
            is_background=is_background,
        )
        if spec.HasField("max_charge"):
            _check_max_charge(spec, price, is_background=is_background)
            most = min(most, spec.max_charge.nanos)
        return Checked(
            offering=offering,
            price=price,
            adapter=adapter,
            may_reason=self._workers.may_reason(offering.model_version),
            count=count,
            max_output_tokens=max_output_tokens,
            input_bound=input_bound,
            is_input_exact=size.is_exact,
            is_background=is_background,
            most=most,
        )

    def _adapter(
        self, spec: generation_pb2.GenerationSpec, offering: Offering, project: str
    ) -> Adapter:
        if not spec.adapter.startswith("adapters/"):
            raise invalid_field("spec.adapter", FieldRule.BAD_FORMAT, "must be adapters/{adapter}")
        adapter = self._adapters.get(spec.adapter, project)
        if adapter.model_version != offering.model_version:
            raise invalid_field(
                "spec.adapter",
                FieldRule.CONFLICTING,
                f"was made for {adapter.model_version}, and {offering.name} serves "
                f"{offering.model_version}",
            )
        return adapter


def _require(spec: generation_pb2.GenerationSpec, able: Capabilities, model: str) -> None:
    capabilities.require(spec, able, model=model, prefix="spec")
    if spec.tools.mode == tools_pb2.TOOL_MODE_REQUIRED and not able.strict_tools:
        # One value of a field, of which the contract's rule for fields cannot speak.
        raise unsupported(
            "spec.tools.mode",
            "the model cannot be made to call a tool (strict_tools)",
            feature="strict_tools",
            model=model,
        )


def _max_output_tokens(spec: generation_pb2.GenerationSpec, offering: Offering) -> int:
    stop = spec.stop
    if not stop.HasField("max_output_tokens"):
        most = min(offering.default_max_output_tokens, offering.context_length)
        if stop.min_output_tokens > most:
            raise spec_rules.too_few_output_tokens(most)
        return most
    wanted = stop.max_output_tokens
    if wanted > offering.context_length:
        raise invalid_field(
            "spec.stop.max_output_tokens",
            FieldRule.OUT_OF_RANGE,
            f"must be at most {offering.context_length}, the context of {offering.name}",
        )
    return wanted


def _check_max_charge(
    spec: generation_pb2.GenerationSpec, price: Price, *, is_background: bool
) -> None:
    limit = spec.max_charge
    if limit.currency_code != CURRENCY:
        raise InvalidArgument(
            f"spec.max_charge: prices are in {CURRENCY}",
            reason=Reason.CURRENCY_MISMATCH,
            metadata={"left": limit.currency_code, "right": CURRENCY},
            violations=[
                Violation(
                    "spec.max_charge.currency_code", FieldRule.OUT_OF_RANGE, f"must be {CURRENCY}"
                )
            ],
        )
    if limit.nanos <= 0:
        raise invalid_field("spec.max_charge.nanos", FieldRule.OUT_OF_RANGE, "must be above 0")
    left = price.bound(limit.nanos, is_background=is_background).nanos
    if left < 0:
        raise invalid_field(
            "spec.max_charge",
            FieldRule.OUT_OF_RANGE,
            f"must be at least {limit.nanos - left} nanos, the price of a request, and its tokens",
        )
