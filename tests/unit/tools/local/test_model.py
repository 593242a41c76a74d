"""tools/local/model.py: ids of a model file, and what is read of it."""

from __future__ import annotations

import hashlib
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.hf_digest import digest_of
from tests.standins.tiny_hf_model import write_model
from tools.local.model import ModelError, model_id_of, read_directory, read_model


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf(template: str | None) -> bytes:
    """A file of metadata alone: one value of each shape, then the template."""
    entries = [
        string("general.name") + struct.pack("<I", 8) + string("x"),
        string("llama.context_length") + struct.pack("<II", 4, 512),
        string("ids") + struct.pack("<IIQ", 9, 5, 2) + struct.pack("<ii", 1, 2),
        string("words") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("b"),
    ]
    if template is not None:
        entries.append(string("tokenizer.chat_template") + struct.pack("<I", 8) + string(template))
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries)


def test_version_is_the_start_of_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "llama 3 (small).gguf"
    path.write_bytes(gguf("{{ messages }}"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()

    got = read_model(path, tmp_path / "models.json")

    assert got.version_name == f"models/llama-3-small/versions/{digest[:12]}"
    assert got.digest == f"sha256:{digest}"
    assert got.chat_template == "{{ messages }}"


def test_file_without_a_template_has_none(tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    path.write_bytes(gguf(None))

    assert read_model(path, tmp_path / "models.json").chat_template == ""


def test_a_directory_is_known_by_all_of_its_files(tmp_path: Path) -> None:
    folder, known = tmp_path / "Tiny HF", tmp_path / "models.json"
    write_model(folder)
    digest = digest_of(folder, lambda _: None)

    first, again = read_directory(folder, known), read_directory(folder, known)
    write_model(folder, seed=2)
    other = read_directory(folder, known)

    assert first == again
    assert (first.model_id, first.digest) == ("Tiny-HF", digest)
    assert first.version_id == digest.removeprefix("sha256:")[:12]
    assert "<|im_start|>" in first.chat_template
    assert (other.model_id, other.chat_template) == (first.model_id, first.chat_template)
    assert other.version_id != first.version_id


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    with pytest.raises(ModelError, match="tokenizer"):
        read_directory(tmp_path, tmp_path.parent / "models.json")


def test_changed_file_is_another_version(tmp_path: Path) -> None:
    path, known = tmp_path / "base.gguf", tmp_path / "models.json"
    path.write_bytes(gguf(None))
    first = read_model(path, known)
    again = read_model(path, known)
    path.write_bytes(gguf("new"))

    second = read_model(path, known)

    assert first == again
    assert (second.model_id, second.version_id != first.version_id) == ("base", True)


@pytest.mark.parametrize(
    "content", [b"", b"safetensors?", b"GGUF", gguf("x")[:-1], b"GGUF" + b"\xff" * 40]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)

    with pytest.raises(ModelError, match=r"model\.gguf"):
        read_model(path, tmp_path / "models.json")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        read_model(tmp_path / "none.gguf", tmp_path / "models.json")


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1))
def test_every_name_makes_an_id_or_is_refused(name: str) -> None:
    try:
        got = model_id_of(Path(f"{name}.gguf"))
    except ModelError:
        return
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", got)
