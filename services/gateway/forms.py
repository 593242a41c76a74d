"""Which kind of generation a request needs: the plain one, or the one that can show everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from maas.inference.v1 import generation_pb2

from services.gateway import spec_rules
from services.gateway.attempts import Attempts
from services.gateway.books import Books
from services.gateway.checks import Checked
from services.gateway.domain import Opening
from services.gateway.generation import new_sink
from services.gateway.placement import Placed
from services.gateway.plain import PlainGeneration
from services.gateway.replay import UNBOUNDED, Budget, ReplayLog
from services.gateway.rich import AnySink, RichSink, RichTerms
from services.gateway.rich_generation import RichGeneration
from services.gateway.rich_log import RichLog
from services.gateway.running import Generation
from services.gateway.slices import Hold
from services.gateway.terms import Terms, Times


@dataclass(frozen=True, slots=True)
class Form:
    """How a generation is taken in and handed on.

    Attributes:
        rich: what comes back; None for the text of one output.
        is_exact: as in Terms.
    """

    rich: RichTerms | None
    is_exact: bool

    def new_sink(self) -> AnySink:
        """Makes where the events of an execution arrive, on the running loop."""
        return new_sink() if self.rich is None else RichSink(self.rich)

    def generation(
        self,
        *,
        books: Books,
        opening: Opening,
        terms: Terms,
        hold: Hold,
        attempts: Attempts,
        placed: Placed,
        times: Times,
        budget: Budget,
        replay_bytes_max: int,
        on_end: Callable[[Generation], None],
    ) -> Generation:
        """Makes the generation of an execution that a worker has accepted. Raises as the journal.

        Args:
            books: what all generations share.
            opening: as it is going to be journaled.
            terms: what was agreed on.
            hold: money that is set aside for it.
            attempts: to place it again.
            placed: the execution.
            times: of its admission.
            budget: of all logs.
            replay_bytes_max: output kept of one stream, bytes.
            on_end: told of its end.
        """
        has_log = terms.is_kept or terms.is_unary
        # A whole result is charged, so it has to be there: max_output_tokens bound it, and a rich
        # one that outgrows an answer ends by that.
        bytes_max = UNBOUNDED if terms.is_unary else replay_bytes_max
        if self.rich is None:
            return PlainGeneration(
                books=books,
                opening=opening,
                terms=terms,
                hold=hold,
                attempts=attempts,
                placed=placed,
                times=times,
                log=ReplayLog(budget, bytes_max) if has_log else None,
                on_end=on_end,
            )
        return RichGeneration(
            books=books,
            opening=opening,
            terms=terms,
            hold=hold,
            attempts=attempts,
            placed=placed,
            times=times,
            log=RichLog(budget, bytes_max) if has_log else None,
            budget=budget,
            on_end=on_end,
        )


def form_of(spec: generation_pb2.GenerationSpec, checked: Checked) -> Form:
    """Returns the form that a request needs."""
    is_parsed = _is_parsed(spec, checked)
    output = spec.output
    is_scored = output.return_logprobs or output.return_prompt_logprobs or output.return_token_bytes
    is_one = checked.count == 1
    is_exact = is_one and not spec_rules.has_tools(spec) and not spec.HasField("constraint")
    if is_one and not is_parsed and not is_scored:
        return Form(None, is_exact)
    with_reasoning = output.return_reasoning if output.HasField("return_reasoning") else True
    return Form(
        RichTerms(
            count=checked.count,
            with_ids=output.return_token_ids,
            with_reasoning=with_reasoning,
        ),
        is_exact,
    )


def _is_parsed(spec: generation_pb2.GenerationSpec, checked: Checked) -> bool:
    """Tells whether the worker may split reasoning or calls of tools from the text."""
    if not spec.HasField("chat"):
        return False
    return spec_rules.has_tools(spec) or checked.may_reason
