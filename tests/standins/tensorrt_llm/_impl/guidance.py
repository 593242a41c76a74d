"""Guided decoding: which tokens a grammar lets come next, by llguidance for either backend."""

# ruff: noqa: TID252 - it is imported as tensorrt_llm, and known to mypy as a part of tests

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from .records import GuidedDecodingBase
from .sampling import Mask

_ANY_OBJECT = '{"type": "object"}'


class Guides:
    """Makes guides over the vocabulary of one model."""

    def __init__(self, tokenizer: Path, *, vocabulary: int, eos_id: int, backend: str) -> None:
        text = tokenizer.read_text(encoding="utf-8")
        # It knows one end only, whatever generation_config.json says.
        self._tokenizer = LLTokenizer(text, n_vocab=vocabulary, eos_token=eos_id)
        self._vocabulary, self._eos_id, self._backend = vocabulary, eos_id, backend

    def make(self, params: GuidedDecodingBase) -> Guide:
        """Compiles a grammar.

        Raises:
            ValueError: it does not compile, or the backend does not take its kind.
        """
        matcher = LLMatcher(self._tokenizer, self._grammar(params), log_level=0)
        if matcher.is_error():
            raise ValueError("the grammar does not compile")
        return Guide(matcher, self._vocabulary, self._eos_id)

    def _grammar(self, params: GuidedDecodingBase) -> str:
        if params.json_object:
            return LLMatcher.grammar_from_json_schema(_ANY_OBJECT)
        if params.json is not None:
            return LLMatcher.grammar_from_json_schema(params.json_text())
        if params.regex is not None:
            return LLMatcher.grammar_from_regex(params.regex)
        if params.grammar is not None and self._backend == "llguidance":
            # Nothing but Lark is a grammar to this backend.
            return LLMatcher.grammar_from_lark(params.grammar)
        if params.grammar is not None:
            return LLMatcher.grammar_from_lark(_lark_of(params.grammar))
        return self._structural(params.structural_tag or "")

    def _structural(self, tag: str) -> str:
        """Text with tagged parts that follow schemas, as xgrammar takes it."""
        if self._backend != "xgrammar":
            raise ValueError("structural tags are of xgrammar only")
        parts = []
        for structure in json.loads(tag)["structures"]:
            schema, begin = json.dumps(structure["schema"]), json.dumps(structure["begin"])
            parts.append(f"{begin} %json {schema} {json.dumps(structure['end'])}")
        return LLMatcher.grammar_from_lark(f"start: {' | '.join(parts)}")


def _lark_of(gbnf: str) -> str:
    try:
        return gbnf_to_lark(gbnf)
    except GbnfToLarkError as error:
        raise ValueError("the grammar is no GBNF") from error


class Guide:
    """One output under a grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: int, eos_id: int) -> None:
        self._matcher = matcher
        self._vocabulary, self._eos_id = vocabulary, eos_id
        self._bits = allocate_token_bitmask(1, vocabulary)
        self._is_over = False

    def mask(self) -> Mask | None:
        """What may come next; None when the grammar is through, and anything may."""
        if self._is_over:
            return None
        fill_next_token_bitmask(self._matcher, self._bits)
        bits = np.unpackbits(
            self._bits.view(np.uint8)[0], bitorder="little", count=self._vocabulary
        )
        return bits.view(np.bool_)

    def accept(self, token_id: int) -> None:
        """Takes the next token.

        Raises:
            ValueError: it is not allowed. Nobody catches that in the older versions.
        """
        if self._is_over:
            return
        if token_id == self._eos_id and (
            self._matcher.is_stopped() or self._matcher.is_accepting()
        ):
            self._is_over = True
            return
        taken = self._matcher.try_consume_tokens([token_id])
        if not taken or self._matcher.is_error():
            raise ValueError("the grammar does not accept the last new token")
