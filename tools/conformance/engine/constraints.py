"""What an output under a constraint is."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import jsonschema
from llguidance import grammar_from

from services.worker.engine.base import (
    Constraint,
    ConstraintKind,
    Ended,
    EndReason,
    EngineRequest,
)
from tools.conformance.engine.check import (
    IGNORE_EOS,
    LOGIT_BIAS,
    LOGPROBS,
    MIN_OUTPUT_TOKENS,
    Book,
    constraint,
)
from tools.conformance.engine.harness import Harness, ask, seeded
from tools.conformance.engine.schemas import (
    JsonValue,
    json_constraint,
    json_object,
    regex_constraint,
    schema_of,
)
from tools.conformance.verdict import CannotShow, expect, expect_equal

CONSTRAINTS = Book("constraints")
_SCHEMAS = 30
_GBNF = 'root ::= "(" [0-9] ("+" [0-9]){0,3} ")"'
_CALL = r'<call>\{"name":"(add|sub)","n":[0-9]{1,2}\}</call>'
_CHOICES = ["red", "redder", "green and blue", "«jaune»"]
_EXPRESSIONS = ("(yes|no)", r"[0-9]{4}-[0-9]{2}", "a{2,5}b?", "[à-ü]{2}")
_JSON_SCHEMA = constraint(ConstraintKind.JSON_SCHEMA)
_JSON_OBJECT = constraint(ConstraintKind.JSON_OBJECT)
_REGEX = constraint(ConstraintKind.REGEX)
_GRAMMAR = constraint(ConstraintKind.GRAMMAR)


def constrained(found: Constraint, seed: int, *, tokens: int = 110) -> EngineRequest:
    """Makes a request that is left to chance within a constraint."""
    request = ask(tokens, prompt=(72, 105), sampling=seeded(seed), ignore_eos=False)
    return replace(request, constraint=found)


async def said(harness: Harness, request: EngineRequest, lane: int = 1) -> str:
    """The whole text of an output that has to end by itself."""
    token_ids, ended = await harness.run(lane, request)
    expect_equal(ended.reason, EndReason.END_OF_SEQUENCE, "end of a constrained output")
    return harness.text_of(token_ids)


@CONSTRAINTS.check(_JSON_SCHEMA)
async def outputs_of_any_schema_are_valid(harness: Harness) -> None:
    """Thirty schemas at once, so that constraints of one batch do not mix either."""
    chance = random.Random(20261122)  # noqa: S311 - schemas, not secrets
    schemas = {lane: schema_of(chance) for lane in range(1, _SCHEMAS + 1)}

    for lane, schema in schemas.items():
        harness.submit(lane, constrained(json_constraint(schema), lane))
    await harness.until_ended(*schemas)

    for lane, schema in schemas.items():
        reason = harness.end_of(lane).reason
        expect_equal(reason, EndReason.END_OF_SEQUENCE, f"end of {json.dumps(schema)}")
        text = harness.text_of(harness.told[lane].token_ids)
        expect(_is_valid(text, schema), f"an output is not valid against {json.dumps(schema)}")


def _is_valid(text: str, schema: JsonValue) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


@CONSTRAINTS.check(_JSON_SCHEMA)
async def an_output_that_is_cut_off_is_a_beginning(harness: Harness) -> None:
    """Three tokens of a constant are its beginning."""
    wanted = json_constraint({"const": {"a": [1, 2, 3], "b": "a long enough text"}})
    whole = await said(harness, constrained(wanted, 1), lane=1)

    token_ids, ended = await harness.run(2, constrained(wanted, 1, tokens=3))

    expect_equal(ended.reason, EndReason.MAX_TOKENS, "end")
    expect_equal(len(token_ids), 3, "tokens")
    expect(whole.startswith(harness.text_of(token_ids)), "three tokens are no beginning")


@CONSTRAINTS.check(_JSON_OBJECT)
async def a_json_object_is_one(harness: Harness) -> None:
    """Any JSON object, whole unless it was cut off."""
    for seed in range(3):
        token_ids, ended = await harness.run(seed, constrained(json_object(), seed))

        text = harness.text_of(token_ids)
        expect(text.startswith("{"), "it does not begin as an object")
        if ended.reason is EndReason.END_OF_SEQUENCE:
            expect(_is_valid(text, {"type": "object"}), "an output that ended is no object")
        else:
            expect_equal(ended.reason, EndReason.MAX_TOKENS, "end")


@CONSTRAINTS.cases({regex: regex for regex in _EXPRESSIONS}, _REGEX)
async def a_regular_expression_matches_the_whole(harness: Harness, regex: str) -> None:
    """The whole output matches, characters of two bytes included."""
    text = await said(harness, constrained(regex_constraint(regex), 3))

    expect(re.fullmatch(regex, text) is not None, f"an output does not match {regex}")


@CONSTRAINTS.check(_GRAMMAR)
async def a_grammar_makes_the_whole(harness: Harness) -> None:
    """The whole output is a sentence of the grammar."""
    grammar = grammar_from("gbnf", _GBNF)
    wanted = Constraint(kind=ConstraintKind.GRAMMAR, source=_GBNF, grammar=grammar)

    text = await said(harness, constrained(wanted, 3))

    found = re.fullmatch(r"\([0-9](\+[0-9]){0,3}\)", text)
    expect(found is not None, "an output is no sentence of its grammar")


@CONSTRAINTS.check(constraint(ConstraintKind.CHOICES))
async def a_choice_is_one_of_the_texts(harness: Harness) -> None:
    """Twelve prompts and seeds choose among four texts, one of which begins another."""
    source = json.dumps(_CHOICES)
    wanted = Constraint(
        kind=ConstraintKind.CHOICES, source=source, grammar=grammar_from("choice", source)
    )

    found = set()
    for seed in range(12):
        request = replace(constrained(wanted, seed), prompt_ids=(72, 105, 60 + seed))
        found.add(await said(harness, request, seed))

    expect(found <= set(_CHOICES), "an output is none of the texts")
    if len(found) == 1 and not harness.row.is_repeatable:
        raise CannotShow("this model chooses the same text every time")
    expect(len(found) > 1, "twelve prompts and seeds chose one text")


@CONSTRAINTS.check(constraint(ConstraintKind.TOOLS))
async def a_call_is_what_the_tools_allow(harness: Harness) -> None:
    """A call of a tool with its arguments, marks included."""
    text = await said(harness, constrained(regex_constraint(_CALL, ConstraintKind.TOOLS), 3))

    expect(re.fullmatch(_CALL, text) is not None, "an output is no call")


@CONSTRAINTS.check(_JSON_SCHEMA)
async def a_constrained_continuation_goes_on_where_the_other_stopped(harness: Harness) -> None:
    """From every place of an output the rest follows, and ends by itself."""
    if not harness.row.continues_constraints:
        raise CannotShow("the engine begins a constraint with the first token that it draws")
    schema: JsonValue = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 99},
        "minItems": 3,
        "maxItems": 3,
    }
    request = constrained(json_constraint(schema), 5)
    whole, _ = await harness.run(1, request)

    for cut in range(len(whole) + 1):
        continued = replace(request, continue_ids=tuple(whole[:cut]))
        rest, ended = await harness.run(100 + cut, continued)
        expect_equal(ended.reason, EndReason.END_OF_SEQUENCE, f"end of the rest from {cut}")
        text = harness.text_of([*whole[:cut], *rest])
        expect(_is_valid(text, schema), f"the rest from {cut} does not fit what stands before")
        if harness.info.is_deterministic:
            harness.expect_same(rest, whole[cut:], f"the rest from {cut}")


@CONSTRAINTS.check(_REGEX)
async def a_continuation_that_breaks_the_constraint_fails_alone(harness: Harness) -> None:
    """It fails without saying what its constraint was, and the next is served."""
    free, _ = await harness.run(1, ask(5))
    token_ids = tuple(harness.tokenizer.encode("xyz", parse_special=False))
    request = replace(constrained(regex_constraint("abc"), 1), continue_ids=token_ids)

    _, ended = await harness.run(2, request)

    expect_equal(ended.reason, EndReason.FAILED, "end")
    expect("abc" not in ended.message, "the message holds the constraint")
    harness.expect_same((await harness.run(3, ask(5)))[0], free, "the next output")


@CONSTRAINTS.check(_GRAMMAR)
async def a_grammar_that_does_not_compile_fails_alone(harness: Harness) -> None:
    """What no engine should be given is a failed execution, and no dead engine."""
    broken = Constraint(kind=ConstraintKind.GRAMMAR, source="", grammar="no grammar at all")

    _, ended = await harness.run(1, constrained(broken, 1))

    expect_equal(ended.reason, EndReason.FAILED, "end")
    expect_equal(len((await harness.run(2, ask(5)))[0]), 5, "tokens of the next")


@CONSTRAINTS.check(_REGEX, LOGIT_BIAS)
async def constraint_and_bias_act_together(harness: Harness) -> None:
    """Of two letters that may come, the one that is not forbidden does."""
    letters = {text: harness.tokenizer.encode(text, parse_special=False) for text in "ab"}
    if any(len(token_ids) != 1 for token_ids in letters.values()):
        raise CannotShow("a letter is several tokens in this vocabulary")
    request = constrained(regex_constraint("(a|b)"), 1)
    for banned, text in (("a", "b"), ("b", "a")):
        (token_id,) = letters[banned]
        sampling = replace(request.sampling, logit_bias=((token_id, -100.0),))

        found = await said(harness, replace(request, sampling=sampling), token_id)

        expect(found == text, "the forbidden letter came, or none")


@CONSTRAINTS.check(_REGEX, IGNORE_EOS)
async def ignoring_the_end_goes_on_as_long_as_the_constraint_lets_it(harness: Harness) -> None:
    """An output that may be one to six letters long is six, and has ended by itself."""
    request = replace(constrained(regex_constraint("[ab]{1,6}"), 1), ignore_eos=True)

    text = await said(harness, request)

    expect_equal(len(text), 6, "letters")


@CONSTRAINTS.check(_REGEX)
async def an_output_that_is_complete_with_its_last_token_has_ended_by_itself(
    harness: Harness,
) -> None:
    """With exactly as many tokens as it takes: an end by itself; with one less: no room."""
    whole = constrained(regex_constraint("[0-9]{3}"), 1)
    token_ids, _ = await harness.run(1, whole)

    exact = await harness.run(2, replace(whole, max_output_tokens=len(token_ids)))
    shorter = await harness.run(3, replace(whole, max_output_tokens=len(token_ids) - 1))

    harness.expect_same(exact[0], token_ids, "with exactly as many tokens")
    expect_equal(exact[1], Ended(2, EndReason.END_OF_SEQUENCE), "end")
    harness.expect_same(shorter[0], token_ids[:-1], "with one token less")
    expect_equal(shorter[1], Ended(3, EndReason.MAX_TOKENS), "end with one token less")


@CONSTRAINTS.check(_REGEX, MIN_OUTPUT_TOKENS)
async def more_output_than_the_constraint_lets_be_does_not_come(harness: Harness) -> None:
    """A least output that the constraint has no room for gives way to it."""
    request = replace(constrained(regex_constraint("[ab]{1,6}"), 1), min_output_tokens=50)

    text = await said(harness, request)

    expect_equal(len(text), 6, "letters")


@CONSTRAINTS.check(_REGEX, LOGPROBS, LOGIT_BIAS)
async def a_scored_output_of_no_tokens_ends_like_any_other(harness: Harness) -> None:
    """Only the end and a forbidden word may come: an end by itself, and no row."""
    tokenizer = harness.tokenizer
    barred = [
        (token_id, -100.0)
        for token_id in range(tokenizer.vocabulary_size)
        if tokenizer.token_bytes(token_id).startswith(b"q")
    ]
    request = constrained(regex_constraint("q?"), 1)
    request = replace(request, sampling=replace(request.sampling, logit_bias=tuple(barred)))
    most = harness.info.abilities.max_top_logprobs or 0

    token_ids, ended = await harness.run(1, replace(request, top_logprobs=min(2, most)))

    expect_equal(len(token_ids), 0, "tokens")
    expect_equal(ended, Ended(1, EndReason.END_OF_SEQUENCE), "end")
    expect_equal(len((await harness.run(2, ask(5)))[0]), 5, "tokens of the next")


@CONSTRAINTS.check(_REGEX)
async def an_execution_with_a_constraint_can_be_aborted_at_once(harness: Harness) -> None:
    """An abort right behind the submit ends it, and the next is served."""
    harness.submit(1, constrained(regex_constraint("[a-z]{90}"), 1))

    harness.engine.abort(1)
    await harness.until_ended(1)

    expect_equal(harness.end_of(1).reason, EndReason.ABORTED, "end")
    expect_equal(len((await harness.run(2, ask(5)))[0]), 5, "tokens of the next")
