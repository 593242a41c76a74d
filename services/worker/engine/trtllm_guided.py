"""Constraints as TensorRT-LLM takes them: which kinds there are, and in which field each goes.

A constraint comes as a grammar of llguidance: Lark as it is, or JSON that holds one grammar, a JSON
schema (with the options of its compilation inside) or Lark. TensorRT-LLM's llguidance backend makes
the same of its fields `json` and `grammar`: a schema stays a schema, and its "EBNF" is Lark. So it
enforces exactly what was checked.

Its xgrammar backend reads GBNF, as grammars are written here, and JSON schemas, of which it leaves
out in silence what it does not know; and its regular expressions have other rules about lines. So
with xgrammar there are only grammars, choices (a grammar of texts) and objects without a schema.

Pure: no tensorrt_llm. Both libraries come with it; its llguidance may be older than the worker's.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from typing import Final, cast

from services.worker.engine.base import Constraint, ConstraintKind

LLGUIDANCE: Final = "llguidance"
XGRAMMAR: Final = "xgrammar"
_ANY_OBJECT: Final = '{"type": "object"}'
_CHARACTERS_MAX: Final = 1 << 21

Validate = Callable[[str], str]
"""What is wrong with a grammar; empty for nothing."""


class ConstraintUnusable(Exception):
    """TensorRT-LLM cannot enforce it. Holds nothing of what it says."""


def kinds_of(backend: str | None, fields: frozenset[str]) -> frozenset[ConstraintKind]:
    """Returns which kinds of constraints are enforced as they are meant.

    Args:
        backend: of guided decoding; None for none.
        fields: of GuidedDecodingParams.
    """
    if backend == LLGUIDANCE and {"json", "grammar"} <= fields:
        return frozenset(ConstraintKind)
    kinds = set()
    if backend == XGRAMMAR and "grammar" in fields:
        kinds |= {ConstraintKind.GRAMMAR, ConstraintKind.CHOICES}
    if backend == XGRAMMAR and "json" in fields:
        kinds.add(ConstraintKind.JSON_OBJECT)
    return frozenset(kinds)


def guided_keywords(constraint: Constraint, backend: str) -> dict[str, object]:
    """Returns the one keyword of GuidedDecodingParams.

    Raises:
        ConstraintUnusable: it is of no kind that the backend has, or malformed.
    """
    if len(constraint.grammar) > _CHARACTERS_MAX:
        raise ConstraintUnusable("the constraint is too large")
    if backend == LLGUIDANCE:
        return _for_llguidance(constraint.grammar)
    if constraint.kind is ConstraintKind.JSON_OBJECT:
        return {"json": _ANY_OBJECT}
    if constraint.kind is ConstraintKind.GRAMMAR:
        return {"grammar": constraint.source}
    if constraint.kind is ConstraintKind.CHOICES:
        return {"grammar": _choices(constraint.source)}
    raise ConstraintUnusable("the engine's backend does not enforce such a constraint")


def _for_llguidance(grammar: str) -> dict[str, object]:
    try:
        whole = json.loads(grammar)
    except ValueError:
        return {"grammar": grammar}
    grammars = whole.get("grammars") if isinstance(whole, Mapping) else None
    if not isinstance(grammars, list) or len(grammars) != 1 or not isinstance(grammars[0], dict):
        raise ConstraintUnusable("the constraint is not one grammar")
    schema, lark = grammars[0].get("json_schema"), grammars[0].get("lark_grammar")
    if schema is not None:
        return {"json": json.dumps(schema)}
    if isinstance(lark, str) and lark:
        return {"grammar": lark}
    raise ConstraintUnusable("the constraint has no grammar")


def _choices(source: str) -> str:
    """Texts as GBNF."""
    texts = json.loads(source)
    return "root ::= " + " | ".join(map(_quoted, texts))


def _quoted(text: str) -> str:
    """A text as GBNF and JSON write it alike; what is not ASCII as it is."""
    return json.dumps(text, ensure_ascii=False)


def find_validator(backend: str | None) -> Validate | None:
    """Returns what finds mistakes in a grammar with the library that TensorRT-LLM's backend uses.

    A grammar that does not compile ends the engine in some versions, so it is tried before. None
    where there is no such function.

    Args:
        backend: of guided decoding; None for none.
    """
    return _xgrammar_validator() if backend == XGRAMMAR else _llguidance_validator()


def _llguidance_validator() -> Validate | None:
    try:
        library = importlib.import_module("llguidance")
    except ImportError:
        return None
    validate = getattr(getattr(library, "LLMatcher", None), "validate_grammar", None)
    return cast("Validate", validate) if callable(validate) else None


def _xgrammar_validator() -> Validate | None:
    """Reads grammars as GBNF; the one schema that goes to xgrammar is ours, and is let through."""
    try:
        library = importlib.import_module("xgrammar")
    except ImportError:
        return None
    read: object = getattr(getattr(library, "Grammar", None), "from_ebnf", None)
    if not callable(read):
        return None

    def validate(grammar: str) -> str:
        if grammar.startswith("{"):
            return ""
        try:
            read(grammar)
        except RuntimeError as error:
            return str(error) or "malformed"
        return ""

    return validate


def check_guided(keywords: Mapping[str, object], validate: Validate | None) -> None:
    """Tries to compile what goes to the backend. Up to some hundred milliseconds.

    Args:
        keywords: of GuidedDecodingParams.
        validate: of `find_validator`.

    Raises:
        ConstraintUnusable: it does not compile.
    """
    if validate is None:
        return
    grammar = keywords.get("grammar")
    text = grammar if isinstance(grammar, str) else _as_grammar(str(keywords["json"]))
    if validate(text):
        raise ConstraintUnusable("the constraint does not compile in the engine")


def _as_grammar(schema: str) -> str:
    whole = {"grammars": [{"json_schema": json.loads(schema)}]}
    return json.dumps(whole)
