"""What the stand-in of group `request` makes of a request, between its calls and its model."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from google.protobuf.message import Message
from maas.billing.v1 import ledger_pb2
from maas.catalog.v1 import model_pb2
from maas.common.v1 import usage_pb2
from maas.inference.v1 import generation_pb2, scores_pb2

from libs.errors import Code, InvalidArgument, MaasError, Reason
from libs.units import Rates
from tests.integration.tools.conformance import request_text
from tests.integration.tools.conformance.request_cache import Prefixes
from tests.integration.tools.conformance.request_faults import Wrong
from tests.integration.tools.conformance.request_model import (
    Deltas,
    Manner,
    Said,
    Speaker,
    add_top,
    log_softmax,
    logits_of,
)
from tests.integration.tools.conformance.request_rules import (
    Rules,
    too_long,
    unknown,
)
from tests.integration.tools.conformance.running import INPUT_NANOS, OUTPUT_NANOS, Key
from tests.integration.tools.conformance.serving import refuse
from tests.integration.tools.conformance.stand_in import CONTEXT, StandIn

MODEL = "model"
_MILLION = 10**6
CACHED_NANOS = 75
_BOMB_BYTES = 50_000
REFUSED_WITHIN_S = 0.25
"""Client and services share a process here, and its machine with others."""
_WORD_BYTES = 4
Spec = generation_pb2.GenerationSpec


@dataclasses.dataclass(slots=True, kw_only=True)
class Asked:
    """A request that can be served.

    Attributes:
        spec: as it is served.
        prompt: its tokens.
        cached: how many of them were cached.
        identifier: of the generation.
        project: that asks.
    """

    spec: Spec
    prompt: list[int]
    cached: int
    identifier: str
    project: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What was made of it.

    Attributes:
        said: each output.
        usage: of all.
        charge: nanos.
    """

    said: list[Said]
    usage: usage_pb2.TokenUsage
    charge: int


class RequestHouse(StandIn):
    """Refuses, counts, charges and records."""

    def __init__(
        self,
        wrong: Wrong = Wrong.NOTHING,
        *,
        ignored: str = "",
        off: Sequence[str] = (),
        accepted: str = "",
        unchecked: str = "",
        pace_s: float = 0.0,
    ) -> None:
        super().__init__()
        self.wrong = wrong
        self.rules = Rules(wrong=wrong, off=tuple(off), accepted=accepted, unchecked=unchecked)
        self.manner = Manner(wrong=wrong, ignored=ignored)
        self.pace_s = pace_s
        self.prefixes = Prefixes(wrong, ignored)
        self.adapters: dict[str, model_pb2.Adapter] = {}
        self.numbers = itertools.count()
        self._stuck = ""
        self._harmed = 0
        self.held_until_s = 0.0

    # ---- requests

    @asynccontextmanager
    async def asking(self, request: Message, context: Any) -> AsyncIterator[Key]:
        """Knows the caller; turns errors into statuses."""
        key = await self._key(context)
        try:
            yield key
        except MaasError as error:
            if error.code is Code.INVALID_ARGUMENT and request.ByteSize() > _BOMB_BYTES:
                await self._after_bomb(request)
            if isinstance(error, InvalidArgument):
                self._cost_of(error)
            await refuse(context, error)

    async def _after_bomb(self, request: Any) -> None:
        spec = getattr(request, "spec", Spec())
        is_deep = spec.constraint.json_schema.startswith("[")
        if self.wrong is Wrong.REFUSAL_SLOW and is_deep:
            await asyncio.sleep(2 * REFUSED_WITHIN_S)
        if self.wrong is Wrong.OTHERS_WAIT:
            self.held_until_s = asyncio.get_running_loop().time() + 0.7

    def _cost_of(self, error: InvalidArgument) -> None:
        costs = {
            Reason.FEATURE_UNSUPPORTED: Wrong.FLAG_COSTS,
            Reason.INVALID_FIELD: Wrong.BOUND_COSTS,
            Reason.BAD_OUTPUT_CONSTRAINT: Wrong.BAD_COSTS,
        }
        if error.reason is Reason.BAD_OUTPUT_CONSTRAINT:
            self._harmed += 1
        if costs.get(error.reason) is self.wrong:
            self.posted -= 1

    def ask(self, request: Any, key: Key) -> Asked:
        """Sees whether a request can be served.

        Raises:
            MaasError: it cannot.
        """
        self._check_size(request.spec)
        self.rules.check(request)
        spec = Spec()
        spec.CopyFrom(request.spec)
        self.require_model(spec.model)
        self.rules.require(spec, spec.model, "spec")
        if spec.adapter and spec.adapter not in self.adapters:
            if self.wrong is not Wrong.ADAPTER_UNKNOWN:
                raise unknown("adapter")
            spec.adapter = ""
        prompt = request_text.prompt_of(spec, self.wrong, self.manner.ignored)
        if len(prompt) + 1 > CONTEXT:
            raise too_long(f"spec.{spec.WhichOneof('input')}")
        self._check_constraint(spec)
        cached = self.prefixes.found(spec, prompt, key.project)
        return Asked(
            spec=spec,
            prompt=prompt,
            cached=cached,
            identifier=f"gen_{next(self.numbers)}",
            project=key.project,
        )

    def _check_size(self, spec: Spec) -> None:
        """Before anything reads it: no text of so many bytes has fewer tokens than fit."""
        if len(spec.text) > _WORD_BYTES * CONTEXT and len(spec.text.encode()) <= 1024 * 1024:
            raise too_long("spec.text")

    def require_model(self, model: str) -> None:
        if model != MODEL and self.wrong is not Wrong.MODEL_GUESSED:
            raise unknown("offering")

    def _check_constraint(self, spec: Spec) -> None:
        kind = spec.constraint.WhichOneof("kind")
        if kind in (None, self.manner.ignored):
            return
        try:
            request_text.allowed_text(spec.constraint, 0)
        except request_text.Refused:
            is_ignored = {
                Wrong.BAD_SCHEMA_ACCEPTED: kind == "json_schema",
                Wrong.BAD_GRAMMAR_ACCEPTED: kind == "grammar",
            }.get(self.wrong, False)
            if not is_ignored:
                raise request_text.bad_constraint(spec.constraint, self.wrong) from None
            spec.ClearField("constraint")

    # ---- what is made

    def make(self, asked: Asked) -> Made:
        """Speaks all outputs, and counts."""
        spec, wrong = asked.spec, self.wrong
        count = spec.output.count if spec.output.HasField("count") else 1
        if count > 1:
            count -= wrong is Wrong.OUTPUT_LOST
            count = 1 if self.manner.ignored == "max_outputs" else count
        spoken = self._spoken(asked)
        said = [
            Speaker(spec, spoken, self._seed(spec, index, count), self.manner).say()
            for index in range(count)
        ]
        usage = usage_pb2.TokenUsage(
            input_tokens=len(asked.prompt),
            cached_input_tokens=asked.cached,
            output_tokens=sum(len(one.ids) for one in said),
            reasoning_tokens=sum(one.thoughts for one in said) if self._counts(spec) else 0,
        )
        charged = charge_of(usage, is_cached_cheaper=wrong is not Wrong.HIT_UNPRICED)
        if wrong is Wrong.PROMPT_COUNTED_AGAIN:
            usage.input_tokens *= count
        if wrong is Wrong.PROMPT_CHARGED_AGAIN:
            charged += (count - 1) * usage.input_tokens * INPUT_NANOS
        if wrong is Wrong.HIT_DEARER and asked.cached:
            charged += 10**6
        return Made(said=said, usage=usage, charge=charged)

    def _counts(self, spec: Spec) -> bool:
        if self.wrong is Wrong.REASONING_HIDDEN_UNCOUNTED and spec.output.HasField(
            "return_reasoning"
        ):
            return False
        return self.wrong is not Wrong.REASONING_UNCOUNTED and self.manner.ignored != "reasoning"

    def _spoken(self, asked: Asked) -> list[int]:
        """The prompt as the model sees it: other tokens make another output."""
        spec, wrong = asked.spec, self.wrong
        if wrong is Wrong.ADAPTER_STAYS:
            self._stuck = spec.adapter = spec.adapter or self._stuck
        others = {
            Wrong.SCORES_CHANGE: int(spec.output.return_logprobs),
            Wrong.BAD_HARMS: self._harmed,
            Wrong.ADAPTER_UNSTABLE: next(self.numbers) if spec.adapter else 0,
        }.get(wrong, 0)
        return [*asked.prompt, others] if others else asked.prompt

    def _seed(self, spec: Spec, index: int, count: int) -> int:
        if self.manner.ignored == "deterministic":
            return next(self.numbers)
        seed = spec.sampling.seed
        if self.wrong is Wrong.FIRST_SEED and count > 1:
            seed += 1
        if not index or self.wrong is Wrong.OUTPUTS_EQUAL:
            return int(seed)
        return int(seed + 1_000_003 * index)

    def settle_request(self, asked: Asked, made: Made) -> None:
        """Takes the money and writes the record."""
        self.prefixes.keep(asked.spec, asked.prompt, asked.project)
        self.posted -= made.charge
        self.record(asked.identifier, made.usage, made.charge, asked.spec)

    def record(
        self, identifier: str, usage: usage_pb2.TokenUsage, charge: int, source: Any
    ) -> None:
        record = ledger_pb2.UsageRecord(
            generation_id=identifier,
            usage=usage,
            charge=self.usd(charge),
            price="prices/p",
            end_user=source.end_user,
            labels={} if self.wrong is Wrong.LABELS_LOST else source.labels,
        )
        if self.wrong is Wrong.RECORD_OFF:
            record.usage.output_tokens -= 1
        if self.wrong is Wrong.EMBED_RECORDED_OFF:
            record.usage.input_tokens -= 1
        if self.wrong is Wrong.HIT_UNRECORDED:
            record.usage.ClearField("cached_input_tokens")
        self.records[identifier] = [record]

    def deltas(
        self, asked: Asked, made: Made, *, is_streamed: bool
    ) -> list[list[generation_pb2.OutputDelta]]:
        call_id = "call" if self.wrong is Wrong.CALL_IDS_REPEAT else asked.identifier
        return [
            Deltas(index, one, asked.spec, self.manner, call_id).cut(is_streamed=is_streamed)
            for index, one in enumerate(made.said)
        ]

    def prompt_scores(self, asked: Asked) -> scores_pb2.PromptScores | None:
        spec = asked.spec
        if not spec.output.return_prompt_logprobs or self.manner.ignored == "prompt_logprobs":
            return None
        found = scores_pb2.TokenScores()
        for place, token in enumerate(asked.prompt):
            if not place and self.wrong is Wrong.PROMPT_LOGPROBS_SHORT:
                continue
            row = log_softmax(logits_of(b"prompt", place)) if place else None
            found.token_ids.append(token)
            found.logprobs.append(float("nan") if row is None else float(row[token]))
            add_top(found, row, spec.output.top_logprobs, self.manner, is_last=False)
        return scores_pb2.PromptScores(scores=found)


def charge_of(usage: usage_pb2.TokenUsage, *, is_cached_cheaper: bool) -> int:
    """Nanos of a generation."""
    rates = Rates(
        input_price=INPUT_NANOS * _MILLION,
        output_price=OUTPUT_NANOS * _MILLION,
        cached_input_price=CACHED_NANOS * _MILLION if is_cached_cheaper else None,
    )
    return rates.charge(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cached_input_tokens=usage.cached_input_tokens,
    )
