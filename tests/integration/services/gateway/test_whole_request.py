"""What admission makes of the fields of a spec, and what reaches workers, scheduler and billing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from maas.common.v1.capabilities_pb2 import Capabilities
from maas.inference.v1 import generation_pb2, tools_pb2

from libs.errors import FieldRule, InvalidArgument, MaasError, NotFound, Reason
from services.gateway.domain import EndCause
from tests.integration.services.gateway.client import Wish, answer
from tests.integration.services.gateway.harness import World, gateway
from tests.integration.services.gateway.neighbours import (
    BOB,
    DIGEST,
    EVE,
    NANOS_PER_CACHED_TOKEN,
    NANOS_PER_TOKEN,
)
from tests.integration.services.gateway.richly import (
    Rich,
    Spec,
    chat,
    lanes_of,
    prefill,
    scored,
    several,
)

BACKGROUND = generation_pb2.PRIORITY_CLASS_BACKGROUND
ABLE = Capabilities(
    chat=True,
    tool_calls=True,
    min_p=True,
    max_outputs=2,
    logprobs=True,
    max_top_logprobs=3,
    adapters=True,
)


async def served(world: World, wish: Wish, cached_tokens: int = 0) -> None:
    """Has a request run to its end, with three tokens of input and two of output."""
    stream = world.client.stream(wish)
    execution = await world.accepted(input_tokens=3)
    for lane in lanes_of(execution):
        if cached_tokens:
            prefill(world.workers[0], lane, cached_tokens)
        world.workers[0].say(lane, "a", "b")
        world.workers[0].end(lane)
    await stream.rest()
    assert stream.last.HasField("finished")


# Capabilities.


def min_p(spec: Spec) -> None:
    spec.sampling.min_p = 0.5


def bias(spec: Spec) -> None:
    spec.sampling.logit_bias[3] = 1.0


def top(count: int) -> Callable[[Spec], object]:
    def change(spec: Spec) -> None:
        scored(spec)
        spec.output.top_logprobs = count

    return change


def strict(spec: Spec) -> None:
    chat(spec)
    spec.tools.tools[0].strict = True


def required(spec: Spec) -> None:
    chat(spec)
    spec.tools.mode = tools_pb2.TOOL_MODE_REQUIRED


def schema(spec: Spec) -> None:
    spec.constraint.json_schema = "{}"


@pytest.mark.parametrize(
    ("change", "path", "rule"),
    [
        (bias, "spec.sampling.logit_bias", FieldRule.UNSUPPORTED),
        (several(3), "spec.output.count", FieldRule.OUT_OF_RANGE),
        (top(4), "spec.output.top_logprobs", FieldRule.OUT_OF_RANGE),
        (strict, "spec.tools.tools[0].strict", FieldRule.UNSUPPORTED),
        (required, "spec.tools.mode", FieldRule.UNSUPPORTED),
        (schema, "spec.constraint.json_schema", FieldRule.UNSUPPORTED),
    ],
)
async def test_what_the_model_cannot_do_is_refused_before_money_moves(
    tmp_path: Path, change: Callable[[Spec], object], path: str, rule: FieldRule
) -> None:
    async with gateway(tmp_path, capabilities=ABLE, available=0) as world:
        error = await world.client.stream(Rich(change=change)).failure()

        assert isinstance(error, InvalidArgument)
        assert [(item.field, item.rule) for item in error.violations] == [(path, rule)]
        if rule is FieldRule.UNSUPPORTED:
            assert error.reason is Reason.FEATURE_UNSUPPORTED
            assert error.metadata["model"] == "offerings/m"
        assert world.scheduler.asked == []
        await world.no_settlement()


@pytest.mark.parametrize("change", [min_p, several(2), top(3), chat])
async def test_what_the_model_can_do_runs(tmp_path: Path, change: Callable[[Spec], object]) -> None:
    async with gateway(tmp_path, capabilities=ABLE) as world:
        await served(world, Rich(change=change))


async def test_fields_that_do_not_go_together_are_refused_before_money_moves(
    tmp_path: Path,
) -> None:
    def change(spec: Spec) -> None:
        spec.stop.min_output_tokens = 101

    async with gateway(tmp_path, available=0) as world:
        error = await world.client.stream(Rich(change=change, most=100)).failure()

        assert [item.field for item in error.violations] == ["spec.stop.min_output_tokens"]
        await world.no_settlement()


async def test_the_least_count_is_held_against_the_default_most(tmp_path: Path) -> None:
    def change(spec: Spec) -> None:
        spec.stop.ClearField("max_output_tokens")
        spec.stop.min_output_tokens = 513

    async with gateway(tmp_path) as world:
        error = await world.client.stream(Rich(change=change)).failure()

        assert [item.field for item in error.violations] == ["spec.stop.min_output_tokens"]


# What the worker gets.


async def test_the_worker_gets_all_that_was_asked_for(tmp_path: Path) -> None:
    def change(spec: Spec) -> None:
        chat(spec)
        bias(spec)
        min_p(spec)
        spec.sampling.seed = 7
        spec.output.return_logprobs = True
        spec.stop.include_stop = True
        spec.reasoning.enabled = True
        spec.constraint.regex = "a+"
        spec.cache.bypass = True
        spec.priority = BACKGROUND

    wish = Rich(change=change)
    async with gateway(tmp_path) as world:
        stream = world.client.stream(wish)
        execution = await world.accepted()
        stream.call.cancel()

    asked = wish.spec()
    for name in ("chat", "output", "tools", "constraint", "reasoning", "priority"):
        assert getattr(execution, name) == getattr(asked, name)
    assert execution.bypass_cache
    assert execution.stop == asked.stop
    assert dict(execution.sampling.logit_bias) == {3: 1.0}
    assert (execution.sampling.min_p, execution.sampling.seed) == (0.5, 7)
    # The offering's, as nothing was said.
    assert execution.sampling.temperature == 1.0
    assert execution.sampling.HasField("top_k")
    assert not execution.HasField("time_limit")
    assert not execution.HasField("adapter")


def salted(salt: str) -> Callable[[Spec], object]:
    def change(spec: Spec) -> None:
        spec.cache.salt = salt

    return change


async def test_tenants_share_the_cache_with_themselves_only(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        salts = []
        for caller, salt in ((BOB, ""), (BOB, ""), (BOB, "x"), (EVE, ""), (EVE, "x")):
            async with world.dial(caller) as client:
                stream = client.stream(Rich(change=salted(salt)))
                salts.append((await world.accepted()).cache_salt)
                stream.call.cancel()

    assert salts[0] == salts[1]
    assert len({bytes(salt) for salt in salts}) == 4
    assert {len(salt) for salt in salts} == {32}


def adapted(name: str) -> Callable[[Spec], object]:
    def change(spec: Spec) -> None:
        spec.adapter = name

    return change


@pytest.mark.parametrize("name", ["adapters/own", "adapters/shared"])
async def test_an_adapter_goes_to_the_worker_as_the_catalog_has_it(
    tmp_path: Path, name: str
) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream(Rich(change=adapted(name)))
        execution = await world.accepted()
        stream.call.cancel()

        assert execution.adapter.name == name
        assert (execution.adapter.path, execution.adapter.digest) == (name.split("/")[1], DIGEST)


@pytest.mark.parametrize("name", ["adapters/none", "adapters/foreign"])
async def test_an_adapter_that_is_not_there_and_one_of_others_look_the_same(
    tmp_path: Path, name: str
) -> None:
    async with gateway(tmp_path, available=0) as world:
        error = await world.client.stream(Rich(change=adapted(name))).failure()

        assert isinstance(error, NotFound)
        assert error.metadata == {"resource": name}
        await world.no_settlement()


@pytest.mark.parametrize("name", ["adapters/older", "own"])
async def test_an_adapter_of_another_version_is_refused_with_its_field(
    tmp_path: Path, name: str
) -> None:
    async with gateway(tmp_path, available=0) as world:
        error = await world.client.stream(Rich(change=adapted(name))).failure()

        assert isinstance(error, InvalidArgument)
        assert [item.field for item in error.violations] == ["spec.adapter"]
        await world.no_settlement()


# What the scheduler is asked.


def preferring(key: str) -> Callable[[Spec], object]:
    def change(spec: Spec) -> None:
        spec.cache.affinity_key = key

    return change


def background(spec: Spec) -> None:
    spec.priority = BACKGROUND


async def test_the_scheduler_is_told_places_affinity_and_priority(tmp_path: Path) -> None:
    async with gateway(tmp_path, capabilities=ABLE) as world:
        changes = [
            lambda _: None, several(2), preferring("k"), adapted("adapters/shared"), background,
        ]  # fmt: skip
        for change in changes:
            await served(world, Rich(change=change))

        asked = world.scheduler.asked
        assert [wanted.places for wanted in asked] == [1, 2, 1, 1, 1]
        assert [len(wanted.affinity) for wanted in asked] == [0, 0, 16, 16, 0]
        assert asked[2].affinity != asked[3].affinity
        assert [wanted.priority == BACKGROUND for wanted in asked] == [False] * 4 + [True]
        # A spare is a single place on whatever worker, for whom somebody waits.
        assert [wanted.takes_spares for wanted in asked] == [True] + [False] * 4


def within(seconds: float) -> Callable[[Spec], object]:
    def change(spec: Spec) -> None:
        limit = Duration()
        limit.FromMilliseconds(round(seconds * 1000))
        spec.max_duration.CopyFrom(limit)

    return change


async def test_max_duration_bounds_the_queue_and_the_output(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream(Rich(change=within(2.0)))
        execution = await world.accepted()
        stream.call.cancel()

        (wanted,) = world.scheduler.asked
        limit = execution.time_limit.seconds + execution.time_limit.nanos / 1e9
        assert 0 < limit <= wanted.max_wait_s <= 2.0


async def test_a_long_max_duration_leaves_the_queue_its_own_bound(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream(Rich(change=within(3600)))
        await world.accepted()
        stream.call.cancel()

        assert world.scheduler.asked[0].max_wait_s == 5.0


# Money.


async def test_cached_input_has_its_price_and_is_said(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream(Wish())
        call = world.client.unary(Wish())
        for _ in range(2):
            lane = (await world.accepted(input_tokens=5)).lane
            prefill(world.workers[0], lane, 4)
            world.workers[0].say(lane, "a")
            world.workers[0].end(lane)
        await stream.rest()
        whole = await answer(call)

        owed = 4 * NANOS_PER_CACHED_TOKEN + (1 + 1) * NANOS_PER_TOKEN
        finished = stream.last.finished
        for usage, charge in ((finished.usage, finished.charge), (whole.usage, whole.charge)):
            assert (usage.input_tokens, usage.cached_input_tokens) == (5, 4)
            assert charge.nanos == owed
        for item in await world.settlements(2):
            assert (item.owed, item.closing.cached_input_tokens) == (owed, 4)


async def test_a_cached_count_above_the_prompt_is_cut(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        await served(world, Wish(), cached_tokens=99)

        assert (await world.only_settlement()).closing.cached_input_tokens == 3


async def test_the_hold_reckons_with_an_empty_cache(tmp_path: Path) -> None:
    worst = (5 + 2 + 100) * NANOS_PER_TOKEN
    async with gateway(tmp_path, available=worst - 1) as world:
        error = await world.client.stream(Wish(most=100)).failure()

        assert error.reason is Reason.INSUFFICIENT_CREDIT


async def test_the_cached_count_is_durable_before_output_is_sent(tmp_path: Path) -> None:
    """What a process finds that starts after a kill."""
    async with gateway(tmp_path) as world:
        stream = world.client.stream(Wish())
        lane = (await world.accepted(input_tokens=5)).lane
        prefill(world.workers[0], lane, 4)
        world.workers[0].say(lane, "a")
        await stream.until(1)

        world.journal._earlier = [world.journal._path(world.journal._number)]
        ((_, closing),) = world.journal.recover(world.generations._clock.now()).settlements

        assert (closing.output_tokens, closing.cached_input_tokens) == (1, 4)
        assert closing.cause is EndCause.GATEWAY_LOST
        stream.call.cancel()


async def test_an_input_that_was_cached_is_cheaper_even_without_output(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream(Wish())
        lane = (await world.accepted(input_tokens=5)).lane
        prefill(world.workers[0], lane, 5)
        world.workers[0].end(lane)
        await stream.rest()

        assert (await world.only_settlement()).owed == 5 * NANOS_PER_CACHED_TOKEN


async def test_a_charge_limit_is_of_all_outputs_together(tmp_path: Path) -> None:
    limit = (3 + 4) * NANOS_PER_TOKEN
    async with gateway(tmp_path, available=limit) as world:
        (worker,) = world.workers
        stream = world.client.stream(Rich(change=several(2), max_charge=limit))
        lanes = lanes_of(await world.accepted(input_tokens=3))
        worker.say(lanes[0], "a", "b")
        worker.say(lanes[1], "c", "d")
        await stream.until(4)
        worker.say(lanes[1], "e")

        assert (await stream.failure()).reason is Reason.ENGINE_FAILURE
        assert stream.last.output_tokens <= 4


async def test_labels_and_end_user_are_settled(tmp_path: Path) -> None:
    def change(spec: Spec) -> None:
        spec.labels["team"] = "a"
        spec.end_user = "u-1"

    async with gateway(tmp_path) as world:
        await served(world, Rich(change=change))

        opening = (await world.only_settlement()).opening
        assert (dict(opening.labels), opening.end_user) == ({"team": "a"}, "u-1")


@pytest.mark.parametrize("change", [min_p, several(2), scored, salted("x"), within(5)])
async def test_a_request_id_with_another_field_is_a_mistake(
    tmp_path: Path, change: Callable[[Spec], object]
) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream(Rich(request_id="r-1"))
        await world.accepted()
        await stream.until(0)

        error = await world.client.stream(Rich(request_id="r-1", change=change)).failure()

        assert error.reason is Reason.REQUEST_ID_REUSED
        stream.call.cancel()


# Refusals of workers.


@pytest.mark.parametrize(
    ("code", "reason"),
    [(3, "BAD_OUTPUT_CONSTRAINT"), (9, "ADAPTER_UNUSABLE"), (3, "FEATURE_UNSUPPORTED")],
)
async def test_what_a_worker_refuses_is_refused_typed_and_free(
    tmp_path: Path, code: int, reason: str
) -> None:
    async with gateway(tmp_path, worker_count=2) as world:
        stream = world.client.stream(Rich(change=several(2)))
        execution = await world.workers[0].next_start()
        for lane in lanes_of(execution):
            world.workers[0].fail(lane, code, reason)

        error: MaasError = await stream.failure()

        assert error.reason.value == reason
        assert world.workers[1].requests.empty()
        await world.no_settlement()
