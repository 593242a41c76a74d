from __future__ import annotations

import numpy as np
import pytest
from llguidance import LLMatcher

from services.worker.engine import matcher
from services.worker.engine.matcher import COMPILED_MAX, Matcher, MatcherError, MatcherFactory
from services.worker.engine.sim_tokenizer import BYTE_COUNT, CONTROL_TOKENS, SimTokenizer

TOKENIZER = SimTokenizer()
PIECES = [TOKENIZER.token_bytes(token_id) for token_id in range(TOKENIZER.vocabulary_size)]
CONTROLS = range(BYTE_COUNT, BYTE_COUNT + len(CONTROL_TOKENS))
ENDS = (BYTE_COUNT + 1, BYTE_COUNT + 2)
FACTORY = MatcherFactory(PIECES, end_ids=ENDS, control_ids=CONTROLS)


def matches(regex: str) -> Matcher:
    return FACTORY.make(LLMatcher.grammar_from_regex(regex))


def spell(matcher: Matcher, text: str) -> None:
    for byte in text.encode():
        matcher.accept(byte)


def say_a(matcher: Matcher, times: int) -> None:
    for _ in range(times):
        matcher.mask()
        matcher.accept(ord("a"))


def allowed_pieces(matcher: Matcher) -> set[bytes]:
    mask = matcher.mask()
    return {PIECES[token_id] for token_id in np.flatnonzero(mask) if token_id not in CONTROLS}


def may_end(matcher: Matcher) -> bool:
    mask = matcher.mask()
    ends = {bool(mask[token_id]) for token_id in ENDS}
    assert len(ends) == 1, "all end tokens are allowed, or none"
    return ends.pop()


def test_mask_allows_what_the_regex_allows_in_any_spelling() -> None:
    matcher = matches("(the|this) cat")

    assert allowed_pieces(matcher) >= {b"t", b"th", b"the", b"this"}
    assert allowed_pieces(matcher) <= {b"t", b"th", b"the", b"this"}


def test_end_is_allowed_exactly_where_the_output_may_end() -> None:
    matcher = matches("a+b?")
    assert not may_end(matcher)

    spell(matcher, "aa")

    assert (may_end(matcher), matcher.is_over) == (True, False)
    spell(matcher, "b")
    assert (may_end(matcher), matcher.is_over) == (True, True)
    assert allowed_pieces(matcher) == set()


def test_control_tokens_are_never_text() -> None:
    mask = matches(r"(?s:.*)").mask()

    assert not mask[BYTE_COUNT]
    assert mask[ord("<")]


def test_a_token_that_does_not_fit_is_refused_without_showing_the_grammar() -> None:
    matcher = matches("secret")

    with pytest.raises(MatcherError) as caught:
        matcher.accept(ord("z"))

    assert "secret" not in str(caught.value)


def test_the_end_is_refused_where_the_output_may_not_end() -> None:
    matcher = matches("ab")

    with pytest.raises(MatcherError):
        matcher.accept(ENDS[0])


@pytest.mark.parametrize("end", ENDS)
def test_every_end_token_ends(end: int) -> None:
    matcher = matches("ab")
    spell(matcher, "ab")

    matcher.accept(end)

    assert matcher.is_over


@pytest.mark.parametrize(
    "grammar",
    [
        "no grammar at all",
        LLMatcher.grammar_from_regex("(a"),
        LLMatcher.grammar_from_json_schema('{"type": "nothing"}'),
        LLMatcher.grammar_from_lark("start: missing"),
    ],
)
def test_malformed_grammars_are_refused(grammar: str) -> None:
    with pytest.raises(MatcherError, match="malformed or too large"):
        FACTORY.make(grammar)


def test_matchers_of_one_grammar_do_not_share_their_place() -> None:
    first = matches("abc")
    spell(first, "ab")

    second = matches("abc")

    assert allowed_pieces(first) == {b"c"}
    assert allowed_pieces(second) == {b"ab"}


def test_a_step_that_would_take_too_long_is_an_error() -> None:
    matcher = matches("((a{1,1000}){1,1000}){1,1000}")

    with pytest.raises(MatcherError, match="too many steps"):
        say_a(matcher, times=200)


def test_an_output_whose_steps_get_ever_longer_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matcher, "AHEAD_CPU_S", 0.05)
    monkeypatch.setattr(matcher, "STEP_CPU_S", 0.001)
    # As many ways to read a text as there are ways to put brackets around its letters.
    ambiguous = FACTORY.make(LLMatcher.grammar_from_lark('start: x\nx: x x | "a"\n'))

    with pytest.raises(MatcherError, match="too much time"):
        say_a(ambiguous, 1000)
    say_a(matches("a*"), 1000)


def test_forced_text_goes_in_long_tokens() -> None:
    matcher = matches("the river[.]")
    said: list[bytes] = []
    for _ in range(20):
        if matcher.is_over:
            break
        (token_id,) = np.flatnonzero(matcher.mask())
        matcher.accept(int(token_id))
        said.append(PIECES[token_id])

    assert said == [b"the", b" river", b"."]


def test_equal_tokens_are_all_allowed() -> None:
    factory = MatcherFactory([b"a", b"b", b"a", b""], end_ids=[3], control_ids=[3])

    mask = factory.make(LLMatcher.grammar_from_regex("[ab]+")).mask()

    assert mask.tolist() == [True, True, True, False]


def test_a_vocabulary_without_what_the_grammar_needs_is_an_error() -> None:
    factory = MatcherFactory([b"a", b"b", b""], end_ids=[2], control_ids=[2])

    with pytest.raises(MatcherError):
        factory.make(LLMatcher.grammar_from_regex("xy")).mask()


def test_compiled_grammars_are_kept_up_to_a_bound() -> None:
    factory = MatcherFactory(PIECES, end_ids=ENDS, control_ids=CONTROLS)

    for number in range(3 * COMPILED_MAX):
        factory.make(LLMatcher.grammar_from_regex(f"a{number}"))

    assert len(factory._compiled) == COMPILED_MAX
