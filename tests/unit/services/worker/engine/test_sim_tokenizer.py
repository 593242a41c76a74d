from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine.sim_tokenizer import CONTROL_TOKENS, SimTokenizer

TOKENIZER = SimTokenizer()


def spell(token_ids: list[int]) -> str:
    return b"".join(TOKENIZER.token_bytes(token_id) for token_id in token_ids).decode()


@settings(deadline=None)
@given(text=st.text())
def test_any_text_comes_back(text: str) -> None:
    assert spell(TOKENIZER.encode(text, parse_special=False)) == text


@settings(deadline=None)
@given(text=st.text(alphabet="the river, THE\n 12aß"))
def test_texts_of_words_come_back(text: str) -> None:
    assert spell(TOKENIZER.encode(text, parse_special=True)) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("the", 1), (" river", 1), ("The river run", 3), ("  ", 1), ("7", 1), ("é", 2)],
)
def test_known_words_are_one_token(text: str, count: int) -> None:
    assert len(TOKENIZER.encode(text, parse_special=False)) == count


@pytest.mark.parametrize("text", CONTROL_TOKENS)
def test_control_tokens_are_read_only_on_request(text: str) -> None:
    read = TOKENIZER.encode(f"a{text}b", parse_special=True)
    typed = TOKENIZER.encode(f"a{text}b", parse_special=False)

    assert len(read) == 3
    assert TOKENIZER.token_bytes(read[1]) == b""
    assert spell(typed) == f"a{text}b"


def test_vocabulary_is_a_few_thousand_tokens_without_duplicates() -> None:
    pieces = [TOKENIZER.token_bytes(token_id) for token_id in range(TOKENIZER.vocabulary_size)]

    assert 4000 < len(pieces) < 10_000
    assert len(set(pieces)) == len(pieces) - len(CONTROL_TOKENS) + 1


@pytest.mark.parametrize("text", ["a" * 2**20, "qwertyuiop " * 2**16, "😀" * 2**18, " \n" * 2**19])
def test_a_mebibyte_of_anything_comes_back(text: str) -> None:
    assert spell(TOKENIZER.encode(text, parse_special=True)) == text
