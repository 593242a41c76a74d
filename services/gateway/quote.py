"""What a generation would take, and what an offering can do: answered without running anything.

A quote is refused where admission would refuse, by the same checks, but for credit and a place. The
size of the prompt is the worker's own count.
"""

from __future__ import annotations

from dataclasses import dataclass

from maas.engine.v1 import engine_pb2, engine_service_pb2
from maas.inference.v1 import generation_pb2, generation_service_pb2

from libs.rpc import Call
from services.gateway import convert
from services.gateway.checks import Checked, Checks
from services.gateway.inquiries import Inquirer
from services.gateway.tables import Offerings, Workers, no_ready_worker
from services.gateway.turnstile import Turnstile

# Nothing runs, so nothing is ever known by it.
EXECUTION_ID = "quote"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """A prompt that was counted.

    Attributes:
        checked: what it is the prompt of.
        input_tokens: exact.
    """

    checked: Checked
    input_tokens: int

    @property
    def remaining_tokens(self) -> int:
        """Most output tokens that still fit into the context window."""
        return max(self.checked.offering.context_length - self.input_tokens, 0)

    @property
    def most(self) -> int:
        """Nanos that it can cost at most: the whole prompt uncached, and all output."""
        checked = self.checked
        output_tokens = checked.count * checked.max_output_tokens
        most: int = checked.price.rates.most(
            input_tokens=self.input_tokens,
            output_tokens=output_tokens,
            is_background=checked.is_background,
        )
        return most


class Quotes:
    """Answers questions about generations that do not run."""

    def __init__(
        self,
        *,
        checks: Checks,
        offerings: Offerings,
        workers: Workers,
        inquirer: Inquirer,
        turnstile: Turnstile,
    ) -> None:
        """Keeps what it needs.

        Args:
            checks: those of admission.
            offerings: what tenants may call.
            workers: those that take work.
            inquirer: asks workers.
            turnstile: bounds the calls in flight.
        """
        self._checks = checks
        self._offerings = offerings
        self._workers = workers
        self._inquirer = inquirer
        self._turnstile = turnstile

    async def size(self, spec: generation_pb2.GenerationSpec, call: Call) -> Sized:
        """Checks a spec and counts its prompt.

        Args:
            spec: what would be generated.
            call: that asks.

        Raises:
            MaasError: it is refused, or no worker answers.
        """
        project = f"projects/{call.require_principal().project}"
        with self._turnstile.passing(project):
            checked = self._checks.check(spec, project)
            execution = _execution(spec, checked)
            answer = await self._inquirer.ask(
                execution.model_version,
                lambda stub: stub.CountTokens,
                engine_service_pb2.CountTokensRequest(execution=execution),
                field=f"spec.{execution.WhichOneof('input')}",
                deadline_s=call.deadline_s,
            )
            return Sized(checked=checked, input_tokens=answer.input_tokens)

    async def quote(
        self, spec: generation_pb2.GenerationSpec, call: Call
    ) -> generation_service_pb2.QuoteGenerationResponse:
        """Says what a generation would take.

        Args:
            spec: what would be generated.
            call: that asks.

        Raises:
            MaasError: it is refused, or no worker answers.
        """
        sized = await self.size(spec, call)
        checked = sized.checked
        most = sized.most
        if spec.HasField("max_charge"):
            # The output ends before it costs more.
            most = min(most, spec.max_charge.nanos)
        return generation_service_pb2.QuoteGenerationResponse(
            offering=checked.offering.name,
            model_version=checked.offering.model_version,
            price=checked.price.name,
            input_tokens=sized.input_tokens,
            max_output_tokens=checked.max_output_tokens,
            count=checked.count,
            hold=convert.money_to_pb(checked.most),
            most=convert.money_to_pb(most),
        )

    def capabilities(self, model: str) -> generation_service_pb2.GetCapabilitiesResponse:
        """Says what an offering can do now.

        Args:
            model: its id or name.

        Raises:
            NotFound: there is no such offering.
            Unavailable: NO_READY_WORKER.
        """
        offering = self._offerings.get(model)
        able = self._workers.capabilities_of(offering.model_version)
        if able is None:
            self._workers.require()
            raise no_ready_worker(offering.model_version)
        return generation_service_pb2.GetCapabilitiesResponse(
            offering=offering.name,
            model_version=offering.model_version,
            context_length=offering.context_length,
            capabilities=able,
        )


def _execution(spec: generation_pb2.GenerationSpec, checked: Checked) -> engine_pb2.Execution:
    """Makes what a worker would get, which checks all of it."""
    execution = convert.execution_to_pb(
        spec,
        checked.offering,
        checked.price,
        seed=spec.sampling.seed,
        max_output_tokens=checked.max_output_tokens,
        adapter=checked.adapter,
    )
    execution.execution_id = EXECUTION_ID
    execution.more_lanes[:] = range(1, checked.count)
    return execution
