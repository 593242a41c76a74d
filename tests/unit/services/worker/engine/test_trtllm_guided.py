"""Constraints as each backend of TensorRT-LLM takes them."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from services.worker.engine.base import Constraint, ConstraintKind
from services.worker.engine.trtllm_guided import (
    LLGUIDANCE,
    XGRAMMAR,
    ConstraintUnusable,
    check_guided,
    find_validator,
    guided_keywords,
    kinds_of,
)

FIELDS = frozenset({"json", "regex", "grammar", "json_object", "structural_tag"})
SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}}'


def constraint(kind: ConstraintKind, grammar: str, source: str = "") -> Constraint:
    return Constraint(kind=kind, source=source, grammar=grammar)


def test_llguidance_enforces_all_kinds_and_xgrammar_only_what_it_reads_alike() -> None:
    assert kinds_of(LLGUIDANCE, FIELDS) == frozenset(ConstraintKind)
    assert kinds_of(XGRAMMAR, FIELDS) == {
        ConstraintKind.GRAMMAR,
        ConstraintKind.CHOICES,
        ConstraintKind.JSON_OBJECT,
    }
    assert kinds_of(None, FIELDS) == frozenset()
    assert kinds_of(LLGUIDANCE, frozenset({"regex"})) == frozenset()


def test_a_schema_stays_one_with_the_options_that_it_was_compiled_with() -> None:
    grammar = LLMatcher.grammar_from_json_schema(SCHEMA, None, {"whitespace_flexible": False})

    found = guided_keywords(constraint(ConstraintKind.JSON_SCHEMA, grammar), LLGUIDANCE)

    assert list(found) == ["json"]
    schema = json.loads(str(found["json"]))
    assert schema.pop("x-guidance") == {"whitespace_flexible": False}
    assert schema == json.loads(SCHEMA)


@pytest.mark.parametrize(
    "grammar", [LLMatcher.grammar_from_lark("start: /ab+/"), LLMatcher.grammar_from_regex("ab+")]
)
def test_everything_else_is_lark(grammar: str) -> None:
    found = guided_keywords(constraint(ConstraintKind.REGEX, grammar), LLGUIDANCE)

    assert found == {"grammar": "start: /ab+/"}


def test_choices_are_a_grammar_that_xgrammar_reads_whatever_stands_in_them() -> None:
    texts = ['say "no"', "back\\slash", "two\nlines", "größe", "a"]
    source = json.dumps(texts)

    found = guided_keywords(constraint(ConstraintKind.CHOICES, "", source), XGRAMMAR)

    # The same grammar, read by another reader of GBNF, matches exactly these texts.
    lark = gbnf_to_lark(str(found["grammar"]))
    assert LLMatcher.validate_grammar(lark) == ""
    assert str(found["grammar"]).count(" | ") == len(texts) - 1


def test_a_kind_that_the_backend_lacks_is_refused() -> None:
    with pytest.raises(ConstraintUnusable):
        guided_keywords(constraint(ConstraintKind.REGEX, "start: /a/", "a"), XGRAMMAR)


@pytest.mark.parametrize(
    "grammar",
    ["[]", '{"grammars": []}', '{"grammars": [{}, {}]}', '{"grammars": [{"lark_grammar": ""}]}'],
)
def test_what_is_not_one_grammar_is_refused(grammar: str) -> None:
    with pytest.raises(ConstraintUnusable):
        guided_keywords(constraint(ConstraintKind.TOOLS, grammar), LLGUIDANCE)


def test_what_does_not_compile_never_reaches_the_engine_and_is_not_repeated() -> None:
    validate = find_validator(LLGUIDANCE)
    assert validate is not None
    check_guided({"grammar": "start: /a/"}, validate)
    check_guided({"json": SCHEMA}, validate)

    for keywords in ({"grammar": "secret: nothing"}, {"json": '{"type": "secret"}'}):
        with pytest.raises(ConstraintUnusable) as refused:
            check_guided(keywords, validate)
        assert "secret" not in str(refused.value)


class Grammar:
    """As xgrammar has it: its reader of GBNF raises at what it does not understand."""

    @staticmethod
    def from_ebnf(text: str) -> object:
        if "secret" in text:
            raise RuntimeError(f"EBNF parser error: {text}")
        return object()


def test_what_goes_to_xgrammar_is_tried_with_xgrammar(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("xgrammar")
    vars(library)["Grammar"] = Grammar
    monkeypatch.setitem(sys.modules, "xgrammar", library)
    validate = find_validator(XGRAMMAR)
    assert validate is not None

    check_guided({"grammar": 'root ::= "a"'}, validate)
    check_guided({"json": '{"type": "object"}'}, validate)
    with pytest.raises(ConstraintUnusable) as refused:
        check_guided({"grammar": "secret"}, validate)
    assert "secret" not in str(refused.value)
