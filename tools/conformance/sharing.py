"""Features of what tenants share and must not: the prefix cache, and the worker's time."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import statistics
from collections.abc import Sequence

from maas.inference.v1 import constraint_pb2, generation_pb2

from libs.errors import Code
from tools.conformance.ability import refused
from tools.conformance.client import Tenant
from tools.conformance.probes import PROMPT, greedy, user
from tools.conformance.trial import Trial
from tools.conformance.verdict import expect, expect_equal

_PARTS = 16
REFUSED_WITHIN_S = 0.05
_ATTEMPTS = 5
_GAP_FACTOR_MAX = 3.0
_GAP_S = 0.05
"""Gaps below it are as good as none, on a machine that others use too."""
_PACED_TOKENS = 400
_MIB = 1024 * 1024
_CONTRACT_MESSAGES = 100_000
_DEEP = 30_000

Spec = generation_pb2.GenerationSpec


async def cache_is_the_tenants(trial: Trial) -> None:
    """Same tenant hits, another never, whatever salt it claims; a hit has its own price."""
    async with trial.tenant() as tenant:
        if not (await tenant.capabilities()).capabilities.prompt_cache:
            trial.lack("the prefix cache: the engine has none")
            return
        spec = _prompt(tenant)
        missed, hit = await tenant.generate(spec), await tenant.generate(spec)
        cached = hit.usage.cached_input_tokens
        expect_equal(missed.usage.cached_input_tokens, 0, "cached tokens of a new prompt")
        expect(cached > 0, "the same tenant found nothing in the cache")
        expect(cached < hit.usage.input_tokens, "all of a prompt came from the cache")
        expect(hit.charge.nanos <= missed.charge.nanos, "a hit costs more than a miss")
        await _not_read(tenant, spec)
        trial.show(f"{cached} of {hit.usage.input_tokens} prompt tokens cached for the same tenant")
        if trial.books is not None:
            record = await trial.books.record(hit.generation_id)
            expect_equal(record.usage, hit.usage, "usage of the record")
            expect_equal(record.charge, hit.charge, "charge of the record")
            trial.show(f"{missed.charge.nanos} nanos without, {hit.charge.nanos} with")
        await _of_another(trial, tenant)


def _prompt(tenant: Tenant) -> Spec:
    """A prompt that nobody has sent yet."""
    spec = greedy(tenant, 4)
    spec.text = f"{secrets.token_hex(8)} " + " ".join([PROMPT] * _PARTS)
    # Each worker has a cache of its own.
    spec.cache.affinity_key = "conformance"
    return spec


async def _not_read(tenant: Tenant, spec: Spec) -> None:
    salted, bypassing = Spec(), Spec()
    salted.CopyFrom(spec)
    bypassing.CopyFrom(spec)
    salted.cache.salt = "another"
    bypassing.cache.bypass = True
    for other, what in ((salted, "another salt"), (bypassing, "bypass")):
        usage = (await tenant.generate(other)).usage
        expect_equal(usage.cached_input_tokens, 0, f"cached tokens with {what}")


async def _of_another(trial: Trial, tenant: Tenant) -> None:
    """In pairs, so that a hit would have been seen: the first tenant's own third call hits."""
    key = await trial.new_key(of_other_project=True)
    async with trial.tenant(key.secret) as stranger:
        for salt in ("", "shared"):
            spec = _prompt(tenant)
            spec.cache.salt = salt
            await tenant.generate(spec)
            theirs = (await stranger.generate(spec)).usage.cached_input_tokens
            ours = (await tenant.generate(spec)).usage.cached_input_tokens
            expect_equal(theirs, 0, "cached tokens of another tenant")
            expect(ours > 0, "the tenant itself found nothing in the cache")
    trial.show("another tenant found nothing, with the same salt neither")


async def bombs_are_refused(trial: Trial) -> None:
    """Prompts made to burn time are refused in 50 ms, and others keep their pace."""
    async with trial.tenant() as tenant, trial.tenant() as bomber:
        can = (await tenant.capabilities()).capabilities
        bombs = _bombs(bomber, has_schema=can.json_schema, has_chat=can.chat)
        alone = await _gaps(tenant)
        paced = asyncio.create_task(_gaps(tenant))
        times = {what: await _refusal_s(bomber, what, spec) for what, spec in bombs.items()}
        beside = await paced
    worst = max(times, key=lambda what: times[what])
    text = f"{len(times)} bombs, slowest {worst}: {times[worst] * 1e3:.0f} ms"
    expect(times[worst] <= REFUSED_WITHIN_S, f"expected refusals in 50 ms, got {text}")
    limit_s = max(_GAP_S, _GAP_FACTOR_MAX * alone)
    figures = f"p99 of gaps {beside * 1e3:.0f} ms beside bombs, {alone * 1e3:.0f} ms alone"
    expect(beside <= limit_s, f"another stream was held up: {figures}")
    trial.show(f"{text}; another stream's {figures}")


def _bombs(tenant: Tenant, *, has_schema: bool, has_chat: bool) -> dict[str, Spec]:
    """Requests that have to be refused, by what they are."""
    found = {
        "1 MiB of one letter": _text(tenant, "a" * _MIB),
        "joined emoji": _text(tenant, "\U0001f468\u200d" * (_MIB // 7)),
        "random letters": _text(tenant, secrets.token_hex(_MIB // 2)),
    }
    if has_chat:
        many = greedy(tenant)
        many.chat.messages.extend([generation_pb2.ChatMessage()] * _CONTRACT_MESSAGES)
        found["100,000 messages"] = many
        deep = greedy(tenant)
        deep.chat.messages.append(user("x"))
        deep.chat.template_variables_json = '{"a":' + "[" * _DEEP + "]" * _DEEP + "}"
        found["deep template variables"] = deep
    if has_schema:
        nested = greedy(tenant)
        schema = "[" * _DEEP + "]" * _DEEP
        nested.constraint.CopyFrom(constraint_pb2.OutputConstraint(json_schema=schema))
        found["deep JSON schema"] = nested
        wide = greedy(tenant)
        names = {f"p{number}": {"$ref": "#/none"} for number in range(2000)}
        schema = json.dumps({"properties": names})
        wide.constraint.CopyFrom(constraint_pb2.OutputConstraint(json_schema=schema))
        found["schema of dangling references"] = wide
    return found


def _text(tenant: Tenant, text: str) -> Spec:
    spec = greedy(tenant)
    spec.text = text
    return spec


async def _refusal_s(tenant: Tenant, what: str, spec: Spec) -> float:
    """Median time of a refusal, seconds."""
    loop = asyncio.get_running_loop()
    times = []
    for _ in range(_ATTEMPTS):
        started_s = loop.time()
        refusal = await refused(tenant, spec, what)
        times.append(loop.time() - started_s)
        expect(refusal.code is Code.INVALID_ARGUMENT, f"{what}: {refusal}")
    return statistics.median(times)


async def _gaps(tenant: Tenant) -> float:
    """99th percentile of the times between the frames of a stream, seconds."""
    spec = tenant.spec(PROMPT, _PACED_TOKENS, seed=1)
    async with tenant.stream(spec) as reading:
        await reading.to_end()
    return _percentile([arrival.at_s for arrival in reading.arrivals[1:]])


def _percentile(moments: Sequence[float]) -> float:
    gaps = sorted(later - earlier for earlier, later in itertools.pairwise(moments))
    expect(bool(gaps), "a stream came in one frame")
    return gaps[int(len(gaps) * 0.99)]
