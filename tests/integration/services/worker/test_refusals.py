"""What a worker refuses, before its engine sees anything: one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2

from libs.errors import Code
from services.worker.work import Work
from tests.integration.services.worker.harness import (
    CONTEXT_LENGTH,
    TOKENIZER,
    Told,
    eventually,
    execution,
    running_worker,
)

USER = generation_pb2.ROLE_USER
VOCABULARY = TOKENIZER.vocabulary_size
MILLION = 10**6


@dataclass(frozen=True, kw_only=True)
class Refusal:
    execution: engine_pb2.Execution
    code: Code = Code.INVALID_ARGUMENT
    reason: str = "INVALID_FIELD"
    metadata: dict[str, str] = field(default_factory=dict)
    template: str | None = None


def changed(change: Callable[[engine_pb2.Execution], None]) -> engine_pb2.Execution:
    made = execution()
    change(made)
    return made


def without_sampling(made: engine_pb2.Execution) -> None:
    made.sampling.ClearField("top_p")


def with_temperature(made: engine_pb2.Execution) -> None:
    made.sampling.temperature = float("nan")


def without_limit(made: engine_pb2.Execution) -> None:
    made.stop.ClearField("max_output_tokens")


def with_unknown_role(made: engine_pb2.Execution) -> None:
    made.chat.messages.add(role=generation_pb2.ROLE_UNSPECIFIED).parts.add(text="x")


def without_messages(made: engine_pb2.Execution) -> None:
    made.chat.SetInParent()


def with_more_at_least_than_at_most(made: engine_pb2.Execution) -> None:
    made.stop.min_output_tokens = made.stop.max_output_tokens + 1


def with_alternatives_alone(made: engine_pb2.Execution) -> None:
    made.output.top_logprobs = 3


def with_a_bias_on_nothing(made: engine_pb2.Execution) -> None:
    made.sampling.logit_bias.update({5: 1.0, VOCABULARY: 1.0})


def with_tools_beside_text(made: engine_pb2.Execution) -> None:
    made.tools.tools.add(name="f")


def with_a_salt_that_is_too_long(made: engine_pb2.Execution) -> None:
    made.cache_salt = b"x" * 33


REFUSALS = {
    "more output at least than at most": Refusal(
        execution=changed(with_more_at_least_than_at_most),
        metadata={"field": "spec.stop.min_output_tokens"},
    ),
    "alternatives without log-probabilities": Refusal(
        execution=changed(with_alternatives_alone), metadata={"field": "spec.output.top_logprobs"}
    ),
    "bias on a token that is not in the vocabulary": Refusal(
        execution=changed(with_a_bias_on_nothing),
        metadata={"field": f"spec.sampling.logit_bias[{VOCABULARY}]"},
    ),
    "tools beside a text": Refusal(
        execution=changed(with_tools_beside_text), metadata={"field": "spec.tools"}
    ),
    "salt that is too long": Refusal(
        execution=changed(with_a_salt_that_is_too_long), metadata={"field": "cache_salt"}
    ),
    "unknown model version": Refusal(
        execution=execution(model_version="models/x/versions/1"),
        code=Code.NOT_FOUND,
        reason="RESOURCE_NOT_FOUND",
        metadata={"resource": "models/x/versions/1"},
    ),
    "prompt that leaves no room": Refusal(
        execution=execution(ids=[65] * CONTEXT_LENGTH),
        reason="CONTEXT_LENGTH_EXCEEDED",
        metadata={"tokens": str(CONTEXT_LENGTH), "limit": str(CONTEXT_LENGTH - 1)},
    ),
    "token that is not in the vocabulary": Refusal(
        execution=execution(ids=[1, 2, 3, VOCABULARY]), metadata={"field": "spec.tokens.ids[3]"}
    ),
    "stop token that is not in the vocabulary": Refusal(
        execution=execution(stop_ids=[5, VOCABULARY + 9]),
        metadata={"field": "spec.stop.stop_token_ids[1]"},
    ),
    "continuation that is not in the vocabulary": Refusal(
        execution=execution(continues=[VOCABULARY]), metadata={"field": "continue_token_ids[0]"}
    ),
    "no input": Refusal(execution=execution(text=None), metadata={"field": "spec.input"}),
    "empty text": Refusal(execution=execution(text=""), metadata={"field": "spec.input"}),
    "chat that renders to nothing": Refusal(
        execution=execution(chat=[(USER, "x")]),
        template="{# nothing #}",
        metadata={"field": "spec.input"},
    ),
    "chat without a template": Refusal(
        execution=execution(chat=[(USER, "x")]),
        template="",
        reason="FEATURE_UNSUPPORTED",
        metadata={"model": "models/sim/versions/1", "feature": "chat"},
    ),
    "chat that the template refuses": Refusal(
        execution=execution(chat=[(USER, "x")]),
        template="{{ raise_exception('roles must alternate') }}",
        metadata={"field": "spec.chat"},
    ),
    "chat that breaks the template": Refusal(
        execution=execution(chat=[(USER, "x")]),
        template="{{ messages[99].content }}",
        metadata={"field": "spec.chat"},
    ),
    "chat with an unknown role": Refusal(
        execution=changed(with_unknown_role), metadata={"field": "spec.chat.messages[0].role"}
    ),
    "chat without messages": Refusal(
        execution=changed(without_messages), metadata={"field": "spec.chat.messages"}
    ),
    "sampling that is not resolved": Refusal(
        execution=changed(without_sampling), metadata={"field": "spec.sampling.top_p"}
    ),
    "temperature that is no number": Refusal(
        execution=changed(with_temperature), metadata={"field": "spec.sampling.temperature"}
    ),
    "no limit of output": Refusal(
        execution=changed(without_limit), metadata={"field": "spec.stop.max_output_tokens"}
    ),
    "empty stop sequence": Refusal(
        execution=execution(stops=["x", ""]), metadata={"field": "spec.stop.stop_sequences"}
    ),
    "too many stop sequences": Refusal(
        execution=execution(stops=["x"] * 17), metadata={"field": "spec.stop.stop_sequences"}
    ),
    "no execution id": Refusal(
        execution=execution(execution_id=""), metadata={"field": "execution_id"}
    ),
    "epoch that is older than ours": Refusal(
        execution=execution(epoch=4),
        code=Code.FAILED_PRECONDITION,
        reason="FENCED",
        metadata={"epoch": "4", "currentEpoch": "5"},
    ),
    "charge limit below the prompt": Refusal(
        execution=execution(
            ids=[1, 2, 3],
            charge_limit=engine_pb2.ChargeLimit(nanos=2, input_price=MILLION, output_price=0),
        ),
        metadata={"field": "spec.max_charge"},
    ),
    "charge limit below one token of output": Refusal(
        execution=execution(
            ids=[1, 2, 3],
            charge_limit=engine_pb2.ChargeLimit(nanos=12, input_price=MILLION, output_price=10**7),
        ),
        metadata={"field": "spec.max_charge"},
    ),
    "charge limit below zero": Refusal(
        execution=execution(charge_limit=engine_pb2.ChargeLimit(nanos=-1)),
        metadata={"field": "charge_limit.nanos"},
    ),
    "budget that is used up": Refusal(
        execution=execution(budget_s=0), code=Code.DEADLINE_EXCEEDED, reason="DEADLINE_EXCEEDED"
    ),
    "budget below zero": Refusal(
        execution=execution(budget_s=-3), code=Code.DEADLINE_EXCEEDED, reason="DEADLINE_EXCEEDED"
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS.keys())
async def test_refused_before_the_engine_sees_anything(refusal: Refusal) -> None:
    async with (
        running_worker(chat_template=refusal.template) as worker,
        worker.gateway() as gateway,
    ):
        if refusal.reason == "FENCED":
            worker.executions.epoch = 5
        submitted: list[object] = []
        worker.engine.submit = lambda *given: submitted.append(given)  # type: ignore[method-assign] # nothing may arrive there

        told = await gateway.run(refusal.execution)

        assert told == Told(ended=told.ended)
        assert told.failure.code == refusal.code
        assert told.failure.reason == refusal.reason
        assert dict(told.failure.metadata) == refusal.metadata
        if told.failure.code == Code.INVALID_ARGUMENT and "field" in refusal.metadata:
            (violation,) = told.failure.violations
            assert violation.field == refusal.metadata["field"]
        assert submitted == []
        assert worker.reports.take(9) == ([], [])


async def test_a_charge_limit_that_is_too_low_says_what_would_do() -> None:
    limit = engine_pb2.ChargeLimit(nanos=12, input_price=MILLION, output_price=10 * MILLION)
    async with running_worker() as worker, worker.gateway() as gateway:
        refused = await gateway.run(execution(1, ids=[1, 2, 3], charge_limit=limit))
        assert "must be 1 nanos more" in refused.failure.message
        limit.nanos += 1

        told = await gateway.run(execution(2, ids=[1, 2, 3], charge_limit=limit))

        assert len(told.token_ids) == 1


async def test_a_long_conversation_is_looked_at_beside_the_event_loop() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        made = execution(1, chat=[(generation_pb2.ROLE_USER, "")] * 600)
        made.chat.messages[500].ClearField("role")
        told = await gateway.run(made)

        assert told.reason == "INVALID_FIELD"
        assert told.failure.metadata["field"] == "spec.chat.messages[500].role"

        await gateway.send(execution(2, chat=[(generation_pb2.ROLE_USER, "")] * 600))
        await gateway.until_ended(2)
        assert gateway.told[2].reason == "CONTEXT_LENGTH_EXCEEDED"


async def test_a_conversation_of_too_many_pieces_is_not_looked_at() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        made = execution(1, chat=[(generation_pb2.ROLE_USER, "x")] * 9000)
        told = await gateway.run(made)

        assert told.reason == "INVALID_FIELD"
        assert dict(told.failure.metadata) == {"field": "spec.chat.messages"}
        assert worker.executions.preparing == 0


async def test_a_newer_epoch_is_welcome() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        worker.executions.epoch = 5

        told = await gateway.run(execution(epoch=6))

        assert len(told.token_ids) == 5


async def test_an_execution_id_that_runs_is_refused_and_goes_on() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        await gateway.send(
            execution(1, tokens=400, execution_id="same"),
            execution(2, tokens=5, execution_id="same"),
        )
        await gateway.until_ended(1, 2)

        assert gateway.told[2].reason == "INVALID_FIELD"
        assert dict(gateway.told[2].failure.metadata) == {"field": "execution_id"}
        assert len(gateway.told[1].token_ids) == 400
        await eventually(lambda: not worker.executions.running_ids())


@pytest.mark.parametrize("text", ["short", "long " * 1200])
async def test_a_defect_on_one_prompt_ends_only_that(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        admission = worker.executions._admission
        work = admission.work

        def make(asked: engine_pb2.Execution) -> Work:
            if asked.lane == 1:
                raise KeyError("a secret of mine")
            return work(asked)

        monkeypatch.setattr(admission, "work", make)
        await gateway.send(execution(1, text=text), execution(2))
        await gateway.until_ended(1, 2)

        assert gateway.told[1].reason == "INTERNAL"
        assert "secret" not in str(gateway.told[1].failure)
        assert len(gateway.told[2].token_ids) == 5


async def test_refusals_say_nothing_of_what_was_typed() -> None:
    template = "{{ raise_exception(messages[0].content) }}"
    async with running_worker(chat_template=template) as worker, worker.gateway() as gateway:
        told = await gateway.run(execution(chat=[(USER, "a secret of mine")]))

        assert "secret" not in str(told.failure)
