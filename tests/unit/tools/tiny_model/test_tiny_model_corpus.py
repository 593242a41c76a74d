"""The corpus: reproducible, marked for the loss, and in the chat format."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tools.tiny_model.chance import Chance
from tools.tiny_model.chat_format import (
    BEGIN_OF_TEXT,
    CHAT_TEMPLATE,
    END_OF_TEXT,
    TURN_END,
    TURN_START,
    as_chat_prompt,
)
from tools.tiny_model.corpus import TRAIN_SEED, iter_documents, read_corpus, write_corpus
from tools.tiny_model.explanations import draw_explanation
from tools.tiny_model.small_talk import draw_beyond, draw_exchange

FIRST_DOCUMENTS_SHA256 = "7eaa9145b5ae37bf46ee73c29eec4e8943f71df600895d03fbfcca8736fd4f33"


def test_the_corpus_of_the_shipped_weights_is_unchanged() -> None:
    """The first documents are pinned: whoever changes them trains new weights, or says why not."""
    documents = [
        [[piece.text, piece.learned] for piece in document]
        for document in iter_documents(TRAIN_SEED, 50)
    ]

    digest = hashlib.sha256(json.dumps(documents).encode()).hexdigest()

    assert digest == FIRST_DOCUMENTS_SHA256


def test_a_document_does_not_depend_on_the_count() -> None:
    """More documents are the same documents and some more."""
    few = list(iter_documents("seed", 5))
    many = list(iter_documents("seed", 10))

    assert many[:5] == few


def test_a_corpus_survives_its_file(tmp_path: Path) -> None:
    """What is written is read back."""
    path = tmp_path / "run" / "corpus.jsonl"

    write_corpus(path, "seed", 20)

    assert list(read_corpus(path)) == list(iter_documents("seed", 20))


def test_answers_are_learned_and_prompts_are_not() -> None:
    """The loss counts what the model says, up to and with the token that ends it."""
    for document in iter_documents("seed", 200):
        learned = [piece.text for piece in document if piece.learned]
        assert learned
        assert learned[-1].endswith((TURN_END, END_OF_TEXT))
        for piece in document:
            if "user\n" in piece.text or piece.text == BEGIN_OF_TEXT:
                assert not piece.learned


def test_a_chat_prompt_ends_where_the_answer_begins() -> None:
    """The template of the file and the text of the corpus are the same format."""
    prompt = as_chat_prompt("hello")

    assert prompt == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert TURN_START in CHAT_TEMPLATE
    assert TURN_END in CHAT_TEMPLATE
    assert "add_generation_prompt" in CHAT_TEMPLATE


def test_small_talk_and_explanations_are_finished_text() -> None:
    """No slot or choice of the tables is left open."""
    for seed in range(300):
        chance = Chance(f"talk/{seed}")
        for draw in (draw_exchange, draw_beyond, draw_explanation):
            prompt, answer = draw(chance)
            assert prompt
            assert answer
            assert not set("[]{}|") & set(prompt + answer)


def test_what_is_beyond_the_model_is_said_to_be() -> None:
    """The fallback says what the model is and promises nothing."""
    for seed in range(50):
        _, answer = draw_beyond(Chance(f"beyond/{seed}"))
        assert "very small" in answer
        assert "short stories" in answer
