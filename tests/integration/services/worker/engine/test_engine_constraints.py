"""The one contract that every engine fulfils: what an output under a constraint is."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import jsonschema
import pytest
from llguidance import LLMatcher, grammar_from

from services.worker.engine.base import (
    Constraint,
    ConstraintKind,
    Ended,
    EndReason,
    EngineRequest,
)
from tests.integration.services.worker.engine.contract import Harness, ask, seeded

SCHEMAS = 30
GBNF = 'root ::= "(" [0-9] ("+" [0-9]){0,3} ")"'
CALL = r'<call>\{"name":"(add|sub)","n":[0-9]{1,2}\}</call>'

JsonValue = dict[str, object]


def json_constraint(schema: JsonValue) -> Constraint:
    source = json.dumps(schema)
    grammar = LLMatcher.grammar_from_json_schema(source, overrides={"whitespace_flexible": False})
    return Constraint(kind=ConstraintKind.JSON_SCHEMA, source=source, grammar=grammar)


def regex_constraint(regex: str, kind: ConstraintKind = ConstraintKind.REGEX) -> Constraint:
    return Constraint(kind=kind, source=regex, grammar=LLMatcher.grammar_from_regex(regex))


def constrained(
    constraint: Constraint, seed: int, *, tokens: int = 110, prompt: tuple[int, ...] = (72, 105)
) -> EngineRequest:
    request = ask(tokens, prompt=prompt, sampling=seeded(seed), ignore_eos=False)
    return replace(request, constraint=constraint)


def cannot(harness: Harness, kind: ConstraintKind) -> bool:
    """Whether an engine says that it does not enforce a kind; the worker refuses it then."""
    return kind not in harness.info.abilities.constraints


def text_of(harness: Harness, token_ids: list[int]) -> str:
    tokenizer = harness.row.tokenizer()
    return b"".join(tokenizer.token_bytes(token_id) for token_id in token_ids).decode()


async def said(harness: Harness, request: EngineRequest, lane: int = 1) -> str:
    """The whole text of an output that ended by itself."""
    token_ids, ended = await harness.run(lane, request)
    assert ended.reason is EndReason.END_OF_SEQUENCE
    return text_of(harness, token_ids)


def schema_of(chance: random.Random, depth: int = 0) -> JsonValue:
    """Any schema whose outputs are short, so that every model gets to their end."""
    leaves = ["boolean", "null", "integer", "enum", "const", "pattern", "text"]
    kind = chance.choice(leaves if depth > 1 else [*leaves, "array", "object", "object", "any of"])
    simple: dict[str, JsonValue] = {
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
        "integer": {"type": "integer", "minimum": chance.randint(-9, 0), "maximum": 50},
        "enum": {"enum": chance.sample(["river", "a b", 7, None, True, "é"], 3)},
        "const": {"const": chance.choice([1, "x", [1, "y"]])},
        "pattern": {"type": "string", "pattern": "^[a-f]{2}-[0-9]$"},
        "text": {"type": "string", "minLength": 1, "maxLength": chance.randint(2, 6)},
    }
    if kind in simple:
        return simple[kind]
    if kind == "array":
        items = schema_of(chance, depth + 1)
        return {"type": "array", "items": items, "minItems": 1, "maxItems": 2}
    if kind == "any of":
        return {"anyOf": [schema_of(chance, depth + 1) for _ in range(2)]}
    names = chance.sample(["a", "name", "is_open", "größe"], chance.randint(1, 3))
    return {
        "type": "object",
        "properties": {name: schema_of(chance, depth + 1) for name in names},
        "required": names[: chance.randint(0, len(names))],
        "additionalProperties": False,
    }


async def test_outputs_of_any_schema_are_valid(harness: Harness) -> None:
    """All at once, so that constraints of one batch do not mix either."""
    if cannot(harness, ConstraintKind.JSON_SCHEMA):
        return
    chance = random.Random(20261122)  # noqa: S311 - schemas, not secrets
    schemas = {lane: schema_of(chance) for lane in range(1, SCHEMAS + 1)}

    for lane, schema in schemas.items():
        harness.submit(lane, constrained(json_constraint(schema), lane))
    await harness.until_ended(*schemas)

    for lane, schema in schemas.items():
        told = harness.told[lane]
        assert told.ended is not None
        assert told.ended.reason is EndReason.END_OF_SEQUENCE, schema
        jsonschema.validate(json.loads(text_of(harness, told.token_ids)), schema)


async def test_an_output_that_is_cut_off_is_a_beginning(harness: Harness) -> None:
    if cannot(harness, ConstraintKind.JSON_SCHEMA):
        return
    constraint = json_constraint({"const": {"a": [1, 2, 3], "b": "a long enough text"}})
    whole = await said(harness, constrained(constraint, 1), lane=1)

    token_ids, ended = await harness.run(2, constrained(constraint, 1, tokens=3))

    assert ended.reason is EndReason.MAX_TOKENS
    assert len(token_ids) == 3
    assert whole.startswith(text_of(harness, token_ids))


async def test_a_json_object_is_one(harness: Harness) -> None:
    if cannot(harness, ConstraintKind.JSON_OBJECT):
        return
    grammar = LLMatcher.grammar_from_json_schema(
        '{"type": "object"}', overrides={"whitespace_flexible": False}
    )
    constraint = Constraint(kind=ConstraintKind.JSON_OBJECT, source="", grammar=grammar)
    for seed in range(3):
        token_ids, ended = await harness.run(seed, constrained(constraint, seed))

        text = text_of(harness, token_ids)
        assert text.startswith("{")
        if ended.reason is EndReason.END_OF_SEQUENCE:
            assert isinstance(json.loads(text), dict)
        else:
            assert ended.reason is EndReason.MAX_TOKENS


@pytest.mark.parametrize("regex", ["(yes|no)", r"[0-9]{4}-[0-9]{2}", "a{2,5}b?", "[à-ü]{2}"])
async def test_a_regular_expression_matches_the_whole(harness: Harness, regex: str) -> None:
    if cannot(harness, ConstraintKind.REGEX):
        return

    text = await said(harness, constrained(regex_constraint(regex), 3))

    assert re.fullmatch(regex, text)


async def test_a_grammar_makes_the_whole(harness: Harness) -> None:
    if cannot(harness, ConstraintKind.GRAMMAR):
        return
    grammar = grammar_from("gbnf", GBNF)
    constraint = Constraint(kind=ConstraintKind.GRAMMAR, source=GBNF, grammar=grammar)

    text = await said(harness, constrained(constraint, 3))

    assert re.fullmatch(r"\([0-9](\+[0-9]){0,3}\)", text)


async def test_a_choice_is_one_of_the_texts(harness: Harness) -> None:
    if cannot(harness, ConstraintKind.CHOICES):
        return
    texts = ["red", "redder", "green and blue", "«jaune»"]
    constraint = Constraint(
        kind=ConstraintKind.CHOICES,
        source=json.dumps(texts),
        grammar=grammar_from("choice", json.dumps(texts)),
    )

    found = {await said(harness, constrained(constraint, seed), seed) for seed in range(12)}

    assert found <= set(texts)
    assert len(found) > 1


async def test_a_call_is_what_the_tools_allow(harness: Harness) -> None:
    if cannot(harness, ConstraintKind.TOOLS):
        return

    text = await said(harness, constrained(regex_constraint(CALL, ConstraintKind.TOOLS), 3))

    assert re.fullmatch(CALL, text)


async def test_a_constrained_continuation_goes_on_where_the_other_stopped(
    harness: Harness,
) -> None:
    if cannot(harness, ConstraintKind.JSON_SCHEMA):
        return
    schema: JsonValue = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 99},
        "minItems": 3,
        "maxItems": 3,
    }
    request = constrained(json_constraint(schema), 5)
    whole, _ = await harness.run(1, request)

    for cut in range(len(whole) + 1):
        rest, ended = await harness.run(
            100 + cut, replace(request, continue_ids=tuple(whole[:cut]))
        )
        assert whole[:cut] + rest == whole
        assert ended.reason is EndReason.END_OF_SEQUENCE


async def test_a_continuation_that_breaks_the_constraint_fails_alone(harness: Harness) -> None:
    if cannot(harness, ConstraintKind.REGEX):
        return
    free, _ = await harness.run(1, ask(5))
    token_ids = tuple(harness.row.tokenizer().encode("xyz", parse_special=False))
    request = replace(constrained(regex_constraint("abc"), 1), continue_ids=token_ids)

    _, ended = await harness.run(2, request)

    assert ended.reason is EndReason.FAILED
    assert "abc" not in ended.message
    assert (await harness.run(3, ask(5)))[0] == free


async def test_a_grammar_that_does_not_compile_fails_alone(harness: Harness) -> None:
    if cannot(harness, ConstraintKind.GRAMMAR):
        return
    broken = Constraint(kind=ConstraintKind.GRAMMAR, source="", grammar="no grammar at all")

    _, ended = await harness.run(1, constrained(broken, 1))

    assert ended.reason is EndReason.FAILED
    assert len((await harness.run(2, ask(5)))[0]) == 5


async def test_constraint_and_bias_act_together(harness: Harness) -> None:
    abilities = harness.info.abilities
    if cannot(harness, ConstraintKind.REGEX) or not abilities.logit_bias:
        return
    (a,) = harness.row.tokenizer().encode("a", parse_special=False)
    (b,) = harness.row.tokenizer().encode("b", parse_special=False)
    request = constrained(regex_constraint("(a|b)"), 1)
    for token_id, text in ((a, "b"), (b, "a")):
        sampling = replace(request.sampling, logit_bias=((token_id, -100.0),))

        assert await said(harness, replace(request, sampling=sampling), token_id) == text


async def test_ignoring_the_end_goes_on_as_long_as_the_constraint_lets_it(
    harness: Harness,
) -> None:
    if cannot(harness, ConstraintKind.REGEX):
        return
    request = replace(constrained(regex_constraint("[ab]{1,6}"), 1), ignore_eos=True)

    token_ids, ended = await harness.run(1, request)

    assert len(text_of(harness, token_ids)) == 6
    assert ended.reason is EndReason.END_OF_SEQUENCE


async def test_an_output_that_is_complete_with_its_last_token_has_ended_by_itself(
    harness: Harness,
) -> None:
    if cannot(harness, ConstraintKind.REGEX):
        return
    whole = constrained(regex_constraint("[0-9]{3}"), 1)
    token_ids, _ = await harness.run(1, whole)

    exact = replace(whole, max_output_tokens=len(token_ids))
    shorter = replace(whole, max_output_tokens=len(token_ids) - 1)

    assert await harness.run(2, exact) == (token_ids, Ended(2, EndReason.END_OF_SEQUENCE))
    assert await harness.run(3, shorter) == (token_ids[:-1], Ended(3, EndReason.MAX_TOKENS))


async def test_more_output_than_the_constraint_lets_be_does_not_come(harness: Harness) -> None:
    if cannot(harness, ConstraintKind.REGEX):
        return
    request = replace(constrained(regex_constraint("[ab]{1,6}"), 1), min_output_tokens=50)

    token_ids, ended = await harness.run(1, request)

    assert len(text_of(harness, token_ids)) == 6
    assert ended.reason is EndReason.END_OF_SEQUENCE


async def test_a_scored_output_of_no_tokens_ends_like_any_other(harness: Harness) -> None:
    if cannot(harness, ConstraintKind.REGEX) or harness.info.abilities.max_top_logprobs is None:
        return
    # Only the end and a word that is forbidden may come.
    tokenizer = harness.row.tokenizer()
    barred = [
        (token_id, -100.0)
        for token_id in range(tokenizer.vocabulary_size)
        if tokenizer.token_bytes(token_id).startswith(b"q")
    ]
    request = constrained(regex_constraint("q?"), 1)
    request = replace(request, sampling=replace(request.sampling, logit_bias=tuple(barred)))

    told = await harness.run(1, replace(request, top_logprobs=2))

    assert told == ([], Ended(1, EndReason.END_OF_SEQUENCE))
    assert len((await harness.run(2, ask(5)))[0]) == 5


async def test_an_execution_with_a_constraint_can_be_aborted_at_once(harness: Harness) -> None:
    if cannot(harness, ConstraintKind.REGEX):
        return
    harness.submit(1, constrained(regex_constraint("[a-z]{90}"), 1))

    harness.engine.abort(1)
    await harness.until_ended(1)

    ended = harness.told[1].ended
    assert ended is not None
    assert ended.reason is EndReason.ABORTED
    assert len((await harness.run(2, ask(5)))[0]) == 5
