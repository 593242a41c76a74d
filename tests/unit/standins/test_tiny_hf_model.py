"""The model directories that tests are served from are what real ones are."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import cast

import pytest
from tokenizers import Tokenizer

from tests.standins.tiny_hf_model import Vocabulary, write_adapter, write_model

TEXT = "Once upon a time the fox said: \u00e9t\u00e9, \u65e5\u672c! "


@pytest.mark.parametrize("vocabulary", ["bytes", "sentencepiece"])
def test_text_survives_the_tokenizer(tmp_path: Path, vocabulary: str) -> None:
    model = write_model(tmp_path, vocabulary=cast("Vocabulary", vocabulary))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids

    assert tokenizer.decode(ids) == TEXT
    assert len(ids) < len(TEXT.encode())
    assert tokenizer.get_vocab_size() == model.tokens < model.vocabulary_rows
    assert tokenizer.encode("a").ids[0] == model.bos_id


def test_one_end_stands_in_the_generation_config_only(tmp_path: Path) -> None:
    model = write_model(tmp_path)

    def read(name: str) -> dict[str, object]:
        return cast("dict[str, object]", json.loads((tmp_path / name).read_text()))

    assert read("config.json")["eos_token_id"] == model.eos_id
    assert read("generation_config.json")["eos_token_id"] == list(model.eos_ids)
    assert len(model.eos_ids) == 2
    assert "chat_template" in read("tokenizer_config.json")


def test_weights_are_safetensors(tmp_path: Path) -> None:
    write_model(tmp_path)
    adapter = write_adapter(tmp_path / "adapter", rank=4)

    for path in (tmp_path / "model.safetensors", adapter / "adapter_model.safetensors"):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[0] != "_"]
        assert max(ends) == len(data) - 8 - length
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4
