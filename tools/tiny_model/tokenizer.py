"""The byte-level BPE tokenizer: trained on the corpus, with our special tokens first.

It needs the library `tokenizers` (the optional extra `train`). The pre-tokenizer is that of GPT-2,
which llama.cpp knows as "gpt-2", so that both cut a text in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.tiny_model.chat_format import SPECIAL_TOKENS
from tools.tiny_model.conversations import Document

VOCABULARY_SIZE = 2048


def empty_tokenizer(model: models.BPE) -> Tokenizer:
    """Return a tokenizer around `model` that cuts bytes as GPT-2 does."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(documents: Iterator[Document]) -> Tokenizer:
    """Return a tokenizer of `VOCABULARY_SIZE` tokens, trained on what is not a special token."""
    tokenizer = empty_tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=2,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_ordinary_texts(documents), trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a file that `Tokenizer.save` wrote."""
    return Tokenizer.from_file(str(path))


def _ordinary_texts(documents: Iterator[Document]) -> Iterator[str]:
    for document in documents:
        text = "".join(piece.text for piece in document)
        for token in SPECIAL_TOKENS:
            text = text.replace(token, "\n")
        yield text
