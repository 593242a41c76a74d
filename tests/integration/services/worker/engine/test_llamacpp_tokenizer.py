"""llama.cpp's tokeniser on the small model's vocabulary."""

from __future__ import annotations

import concurrent.futures
import random
from pathlib import Path

import pytest

from services.worker.engine.base import EngineStartError
from services.worker.engine.llamacpp_tokenizer import TEXT_BYTES_MAX, LlamaCppTokenizer

MODEL = Path(__file__).parents[5] / "services" / "worker" / "models" / "maas-tiny-story.gguf"

TEXTS = [
    "",
    " ",
    "Once upon a time, there was a little girl.",
    "Zwölf Boxkämpfer jagen Viktor.",
    "漢字 and 😀 emoji\n\n\ttabs\r\n",
    "a\0b",
    "   leading and trailing   ",
    "1234567890" * 30,
    "word " * 3000,
]


@pytest.fixture(scope="module")
def tokenizer() -> LlamaCppTokenizer:
    return LlamaCppTokenizer(MODEL)


def test_the_vocabulary_is_that_of_the_file(tokenizer: LlamaCppTokenizer) -> None:
    assert tokenizer.vocabulary_size == 2048
    assert "<|im_start|>" in tokenizer.chat_template
    assert tokenizer.special_tokens == {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
    }
    assert tokenizer.adds_bos is False
    assert tokenizer.bos_id is not None


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_the_bytes_of_the_tokens_make_up_the_text(tokenizer: LlamaCppTokenizer, text: str) -> None:
    ids = tokenizer.encode(text, parse_special=False)

    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_control_tokens_are_tokens_only_where_asked_for(tokenizer: LlamaCppTokenizer) -> None:
    text = "<|im_start|>user\nhi<|im_end|>"

    (start, *_, end) = tokenizer.encode(text, parse_special=True)
    typed = tokenizer.encode(text, parse_special=False)

    assert tokenizer.token_bytes(start) == tokenizer.token_bytes(end) == b""
    assert {start, end}.isdisjoint(typed)
    assert b"".join(map(tokenizer.token_bytes, typed)) == text.encode()


def test_a_lone_surrogate_is_replaced(tokenizer: LlamaCppTokenizer) -> None:
    ids = tokenizer.encode("a\ud800b", parse_special=False)

    assert b"".join(map(tokenizer.token_bytes, ids)) == b"a?b"


def test_a_long_conversation_gets_the_tokens_of_its_parts(tokenizer: LlamaCppTokenizer) -> None:
    """It is cut at control tokens, which must not show."""
    rng = random.Random(4)  # noqa: S311 - no secret
    words = ["story", " ", "\n", "\n\n", "dog.", "é", "<", "|", "<|im", "_start|>", "!  "]
    marks = ["<|im_start|>", "<|im_end|>", "<|im_end|>\n", "<|end_of_text|>"]
    pieces = [
        mark + "".join(rng.choices(words, k=rng.randint(0, 40)))
        for mark in rng.choices(marks, k=400)
    ]
    text = "".join(pieces)

    expected = tokenizer._tokenize(text.encode(), parse_special=True)

    assert tokenizer.encode(text, parse_special=True) == expected
    assert len(list(tokenizer._cut(text.encode()))) > 5


def test_a_text_full_of_control_tokens_takes_no_square_of_its_length(
    tokenizer: LlamaCppTokenizer,
) -> None:
    """10 s when it is not cut."""
    assert len(tokenizer.encode("<|im_start|>" * 50_000, parse_special=True)) == 50_000


@pytest.mark.parametrize("splitter", ["gpt-2", "bloom"])
def test_a_text_of_one_endless_word_is_tokenised(tmp_path: Path, splitter: str) -> None:
    """Words are split by std::regex with bloom: it recurses, and would end this process."""
    path = tmp_path / "model.gguf"
    name = b"tokenizer.ggml.pre" + (8).to_bytes(4, "little") + (5).to_bytes(8, "little")
    data = MODEL.read_bytes()
    assert name + b"gpt-2" in data
    path.write_bytes(data.replace(name + b"gpt-2", name + splitter.encode()))
    tokenizer = LlamaCppTokenizer(path)

    ids = tokenizer.encode("a" * 200_000, parse_special=False)

    assert sum(len(tokenizer.token_bytes(token_id)) for token_id in ids) == 200_000


def test_a_text_beyond_the_limit_is_refused(tokenizer: LlamaCppTokenizer) -> None:
    with pytest.raises(ValueError, match="not tokenised"):
        tokenizer.encode("é" * (TEXT_BYTES_MAX // 2 + 1), parse_special=False)


def test_any_thread_may_encode(tokenizer: LlamaCppTokenizer) -> None:
    expected = [tokenizer.encode(text, parse_special=False) for text in TEXTS]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda text: tokenizer.encode(text, parse_special=False), TEXTS * 20))

    assert got == expected * 20


@pytest.mark.parametrize("token_id", [-1, 2048])
def test_a_token_outside_the_vocabulary_has_no_bytes(
    tokenizer: LlamaCppTokenizer, token_id: int
) -> None:
    with pytest.raises(IndexError):
        tokenizer.token_bytes(token_id)


def test_a_file_that_is_missing_or_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineStartError, match="there is no model file"):
        LlamaCppTokenizer(tmp_path / "none.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(MODEL.read_bytes()[:100])
    with pytest.raises(EngineStartError, match=r"cannot load the vocabulary of .*broken\.gguf"):
        LlamaCppTokenizer(broken)
