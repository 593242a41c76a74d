"""Model directories of which tests change the tokenizer's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.worker.engine.base import EngineStartError
from services.worker.engine.hf_tokenizer import HfTokenizer

Json = dict[str, Any]
MARK = "\N{LOWER ONE EIGHTH BLOCK}"
CONTROLS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>", "<|begin_of_text|>", "<|pad|>"]


def read(folder: Path, name: str) -> Json:
    value: Json = json.loads((folder / name).read_text(encoding="utf-8"))
    return value


def rewrite(folder: Path, name: str, change: Callable[[Json], object]) -> None:
    value = read(folder, name)
    change(value)
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def as_metaspace(scheme: str) -> Callable[[Json], None]:
    """As newer files have it: the mark is put there by another part."""

    def change(file: Json) -> None:
        space = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": scheme}
        file["normalizer"] = None
        file["pre_tokenizer"] = {**space, "split": False}
        file["decoder"] = {
            "type": "Sequence",
            "decoders": [{"type": "ByteFallback"}, {**space, "split": False}],
        }

    return change


def as_unigram(file: Json) -> None:
    as_metaspace("always")(file)
    old = file["model"]["vocab"]
    texts = sorted(old, key=old.__getitem__)
    # Every text of a control token is the likeliest way to spell it.
    vocab = [
        [text, -1.0 if text in CONTROLS else -8.0 - row / 1000] for row, text in enumerate(texts)
    ]
    file["model"] = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": True}


class Directory:
    """A directory whose files a test changes before they are read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def change(self, name: str, **values: object) -> None:
        rewrite(self.folder, name, lambda file: file.update(values))

    def read(self) -> HfTokenizer:
        return HfTokenizer(self.folder)

    def refusal(self) -> str:
        with pytest.raises(EngineStartError) as caught:
            self.read()
        return str(caught.value)
