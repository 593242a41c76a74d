"""The corpus as a file: one JSON list per line, made from a seed.

It reads nothing and downloads nothing; the same seed and count give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tools.tiny_model.chance import Chance
from tools.tiny_model.conversations import Document, Piece, draw_document
from tools.tiny_model.scene import Split

TRAIN_SEED = "maas-tiny-story/train/1"
EVALUATION_SEED = "maas-tiny-story/evaluation/1"


def iter_documents(seed: str, count: int, split: Split = Split.TRAIN) -> Iterator[Document]:
    """Yield `count` documents; document n depends on the seed and on n only."""
    root = Chance(seed)
    for number in range(count):
        yield draw_document(root.child(str(number)), split)


def write_corpus(path: Path, seed: str, count: int) -> int:
    """Write `count` documents to `path`, replacing it, and return the number of characters."""
    characters = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        for document in iter_documents(seed, count):
            characters += sum(len(piece.text) for piece in document)
            line = json.dumps([[piece.text, piece.learned] for piece in document])
            stream.write(line + "\n")
    return characters


def read_corpus(path: Path) -> Iterator[Document]:
    """Yield the documents of a file that `write_corpus` wrote."""
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            yield [Piece(text, learned) for text, learned in json.loads(line)]
