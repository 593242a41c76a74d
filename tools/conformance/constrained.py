"""Features of constrained output: W-12."""

from __future__ import annotations

import asyncio
import json

from maas.inference.v1 import constraint_pb2, generation_pb2

from libs.errors import Code, Reason
from tools.conformance.ability import refused
from tools.conformance.client import Tenant
from tools.conformance.requests import constrained, greedy, matches
from tools.conformance.schemas import generate_schema
from tools.conformance.trial import Trial
from tools.conformance.verdict import expect, expect_equal, expect_same_text

_SCHEMAS = 100
_AT_ONCE = 8
_TOKENS = 900

Constraint = constraint_pb2.OutputConstraint

_BAD = {
    "spec.constraint.json_schema": (
        Constraint(json_schema="{"),
        Constraint(json_schema='{"type": "no such type"}'),
        Constraint(json_schema='{"$ref": "https://example.com/schema.json"}'),
        Constraint(json_schema="[" * 5000 + "]" * 5000),
    ),
    "spec.constraint.regex": (
        Constraint(regex="("),
        Constraint(regex=r"(a)\1"),
        Constraint(regex="a(?=b)"),
    ),
    "spec.constraint.grammar": (
        Constraint(grammar="root ::="),
        Constraint(grammar='root ::= missing "x"'),
    ),
    "spec.constraint.choices": (
        Constraint(choices=constraint_pb2.Choices(values=["a", ""])),
        Constraint(choices=constraint_pb2.Choices(values=["a", "a"])),
    ),
}
"""Constraints that are refused, by the field that the refusal names."""


async def output_matches_its_schema(trial: Trial) -> None:
    """W-12: output of 100 random schemas validates; a bad constraint is refused, harming nobody."""
    books = trial.require_books()
    async with trial.tenants(_AT_ONCE + 1) as tenants:
        can = (await tenants[0].capabilities()).capabilities
        if not can.json_schema:
            trial.lack("JSON schemas: the model cannot be held to one")
            return
        trial.show(await _random_schemas(tenants[:_AT_ONCE]))
        before = await books.posted()
        spec = greedy(tenants[-1], 120)
        alone = await tenants[-1].generate(spec)
        beside, count = await asyncio.gather(tenants[-1].generate(spec), _bad(tenants[0], can))
        expect_same_text(
            beside.outputs[0].text, alone.outputs[0].text, "an output beside bad constraints"
        )
        spent = alone.charge.nanos + beside.charge.nanos
        expect_equal(before - await books.posted(), spent, "nanos taken from the balance")
    trial.show(f"{count} bad constraints refused with their path at no cost, harming nobody")


async def _random_schemas(tenants: list[Tenant]) -> str:
    numbers = iter(range(_SCHEMAS))
    tokens = 0

    async def work(tenant: Tenant) -> None:
        nonlocal tokens
        for number in numbers:
            count = await _one(tenant, number)
            # Not before the await: others count meanwhile.
            tokens += count

    await asyncio.gather(*map(work, tenants))
    return f"{_SCHEMAS} random schemas gave {tokens} tokens of output, all valid"


async def _one(tenant: Tenant, number: int) -> int:
    schema = generate_schema(number).schema
    spec = constrained(tenant, Constraint(json_schema=json.dumps(schema)))
    # Likelier than the likeliest tokens to show what a constraint leaves out.
    spec.sampling.temperature = 1
    spec.sampling.seed = number
    spec.stop.max_output_tokens = _TOKENS
    generation = await tenant.generate(spec)
    output = generation.outputs[0]
    what = f"schema {number}"
    expect_equal(output.end.reason, generation_pb2.FINISH_REASON_END, f"finish reason of {what}")
    expect(matches(output.text, schema), f"the output of {what} does not match it")
    return generation.usage.output_tokens


async def _bad(tenant: Tenant, can: object) -> int:
    count = 0
    for path, constraints in _BAD.items():
        if not getattr(can, path.rpartition(".")[2]):
            continue
        for number, constraint in enumerate(constraints):
            what = f"{path}, bad in way {number}"
            refusal = await refused(tenant, constrained(tenant, constraint), what)
            refusal.expect(Code.INVALID_ARGUMENT, Reason.BAD_OUTPUT_CONSTRAINT, what)
            named = any(field.startswith(path) for field in refusal.fields)
            expect(named, f"{what}: expected a refusal that names it, got {refusal.fields}")
            count += 1
    return count
