from __future__ import annotations

import json
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.engine.base import EngineStartError
from services.worker.engine.hf_digest import BLOCK_BYTES, DigestStopped, digest_of
from services.worker.engine.hf_files import CONFIG_BYTES_MAX, HfFileError
from services.worker.engine.hf_model import HfModel, read_model
from services.worker.engine.hf_safetensors import HEADER_BYTES_MAX, Tensor, read_tensors
from tests.standins.tiny_hf_model import (
    HEADS,
    HIDDEN,
    INNER,
    KEY_HEADS,
    LAYERS,
    write_model,
    write_safetensors,
)

Json = dict[str, Any]


class Directory:
    """A model directory whose files a test changes before they are read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_model(folder)

    def change(self, name: str, **values: object) -> None:
        path = self.folder / name
        file: Json = json.loads(path.read_text(encoding="utf-8"))
        file.update(values)
        path.write_text(json.dumps(file), encoding="utf-8")

    def write(self, name: str, data: bytes = b"{}") -> None:
        (self.folder / name).write_bytes(data)

    def read(self) -> HfModel:
        return read_model(self.folder)

    def refusal(self) -> str:
        with pytest.raises(EngineStartError) as caught:
            self.read()
        return str(caught.value)


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    return Directory(tmp_path / "model")


def safetensors(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(*shape: int, offsets: tuple[int, int], dtype: str = "F32") -> Json:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_model_is_what_its_files_say(directory: Directory) -> None:
    found = directory.read()

    assert found.model_type == "llama"
    assert found.architectures == ("LlamaForCausalLM",)
    assert found.vocabulary_size == directory.model.vocabulary_rows
    assert found.context_length == 512
    assert (found.hidden_size, found.inner_size, found.layers) == (HIDDEN, INNER, LAYERS)
    assert (found.heads, found.key_heads, found.head_size) == (HEADS, KEY_HEADS, HIDDEN // HEADS)
    assert found.weight_bytes == (directory.folder / "model.safetensors").stat().st_size
    assert found.matrices["layers.1.mlp.down_proj"] == (HIDDEN, INNER)
    assert not found.names_code


@pytest.mark.parametrize(("wanted", "expected"), [(None, 512), (100, 100), (10_000, 512)])
def test_an_operator_may_want_less_context_but_not_more(
    directory: Directory, wanted: int | None, expected: int
) -> None:
    assert directory.read().context_within(wanted) == expected


def test_the_part_about_text_goes_before_the_rest(directory: Directory) -> None:
    directory.change("config.json", text_config={"max_position_embeddings": 64, "head_dim": 4})

    found = directory.read()

    assert (found.context_length, found.head_size, found.layers) == (64, 4, LAYERS)


def test_what_a_configuration_leaves_out_is_counted_in_the_weights(directory: Directory) -> None:
    # Models that see leave out what is the default of their class.
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    directory.change("config.json", **dict.fromkeys(names), max_position_embeddings=None)

    found = directory.read()

    assert found.vocabulary_size == directory.model.vocabulary_rows
    assert (found.hidden_size, found.layers) == (HIDDEN, LAYERS)
    assert (found.heads, found.head_size, found.context_length) == (None, None, None)
    assert found.context_within(100) == 100
    with pytest.raises(EngineStartError, match="how long its context is"):
        found.context_within(None)


def test_what_cannot_be_counted_has_to_be_said(directory: Directory) -> None:
    write_safetensors(directory.folder / "model.safetensors", {"other": np.zeros(1, np.float32)})
    for name in ("hidden_size", "vocab_size"):
        directory.change("config.json", **{name: None})
        assert f"config.json has no {name}" in directory.refusal()
        directory.change("config.json", **{name: 1024})


def test_every_file_that_knows_an_end_of_sequence_is_heard(directory: Directory) -> None:
    turn, text = directory.model.eos_ids
    directory.change("config.json", eos_token_id=[7, text])
    directory.change("generation_config.json", eos_token_id=9)

    found = directory.read()

    # The tokenizer's own comes first; the others are in some file each.
    assert found.eos_id == turn
    assert set(found.eos_ids) == {7, 9, text, turn}


def test_ends_that_the_model_has_no_row_for_are_left_out(directory: Directory) -> None:
    directory.change("generation_config.json", eos_token_id=[100_000, -1, True, None])

    assert directory.read().eos_ids == (directory.model.eos_id,)


def test_a_model_without_any_end_is_refused(directory: Directory) -> None:
    (directory.folder / "generation_config.json").unlink()
    directory.change("config.json", eos_token_id=None)
    directory.change("tokenizer_config.json", eos_token=None)

    assert "write eos_token_id into generation_config.json" in directory.refusal()


def test_code_beside_a_model_that_is_built_in_is_left_alone(directory: Directory) -> None:
    directory.change("config.json", auto_map={"AutoConfig": "configuration_x.XConfig"})
    directory.write("configuration_x.py", b"raise SystemExit")

    assert directory.read().names_code


def test_a_model_that_is_known_by_its_own_code_only_is_refused(directory: Directory) -> None:
    directory.change("config.json", auto_map={"AutoConfig": "a.B"}, architectures=None)

    assert "such code is never run" in directory.refusal()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "x.pth", "x.ckpt", "x.pkl"])
def test_pickles_are_refused_beside_safetensors_too(directory: Directory, name: str) -> None:
    directory.write(name)

    assert name in directory.refusal()


def broken(name: str, **values: object) -> Callable[[Directory], None]:
    return lambda directory: directory.change(name, **values)


def written(name: str, data: bytes) -> Callable[[Directory], None]:
    return lambda directory: directory.write(name, data)


def index_of(**files: str) -> Callable[[Directory], None]:
    return written("model.safetensors.index.json", json.dumps({"weight_map": files}).encode())


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda directory: (directory.folder / "config.json").unlink(), "no config.json"),
        (lambda directory: (directory.folder / "model.safetensors").unlink(), "no weights"),
        (written("config.json", b"{"), "config.json is no JSON"),
        (written("config.json", b"[" * 100_000), "config.json is no JSON"),
        (written("config.json", b"[]"), "config.json is no JSON object"),
        (written("config.json", b"\xff"), "config.json is not UTF-8"),
        (written("config.json", b" " * (CONFIG_BYTES_MAX + 1)), "longer than 16777216 bytes"),
        (broken("config.json", model_type=""), "no model_type"),
        (broken("config.json", max_position_embeddings=0), "max_position_embeddings between"),
        (broken("config.json", hidden_size=1.5), "no hidden_size"),
        (broken("config.json", num_key_value_heads="two"), "no num_key_value_heads"),
        (written("model.safetensors", b"pickle"), "no header of a safetensors file"),
        (index_of(a="elsewhere.safetensors"), "'elsewhere.safetensors' that is not there"),
        (index_of(a="../model/model.safetensors"), "that is not there"),
        (index_of(a="model.safetensors"), "which has none such"),
    ],
)
def test_what_cannot_be_loaded_is_refused_at_start(
    directory: Directory, break_it: Callable[[Directory], object], said: str
) -> None:
    break_it(directory)

    assert said in directory.refusal()


def test_an_index_that_agrees_with_its_files_is_fine(directory: Directory) -> None:
    index_of(**{"lm_head.weight": "model.safetensors"})(directory)

    assert directory.read().layers == LAYERS


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineStartError, match="there is no config"):
        read_model(tmp_path / "nowhere")


def test_links_that_lead_out_of_the_directory_are_refused(directory: Directory) -> None:
    config = directory.folder / "config.json"
    outside = config.rename(directory.folder.parent / "config.json")
    config.symlink_to(outside)

    assert "config.json is a link that leads out" in directory.refusal()


def test_links_inside_the_directory_are_followed(directory: Directory) -> None:
    hidden = directory.folder / "..data"
    hidden.mkdir()
    config = directory.folder / "config.json"
    config.rename(hidden / "config.json")
    config.symlink_to("..data/config.json")

    assert directory.read().layers == LAYERS


def test_the_links_of_a_cache_are_followed_into_its_own_blobs_only(directory: Directory) -> None:
    blobs = directory.folder.parent / "models--a--b" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for row, path in enumerate(sorted(directory.folder.iterdir())):
        path.rename(blobs / str(row))
        (snapshot / path.name).symlink_to(f"../../blobs/{row}")

    assert read_model(snapshot).layers == LAYERS

    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../elsewhere/blobs/0")
    with pytest.raises(EngineStartError, match="link to nothing"):
        read_model(snapshot)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no header"),
        (safetensors({}, length=HEADER_BYTES_MAX + 1), "no header"),
        (safetensors({}, length=3), "no header"),
        (safetensors(b"[]"), "no JSON object"),
        (safetensors({"a": 1}), "known type and shape"),
        (safetensors({"a": tensor(1, offsets=(0, 4), dtype="F99")}, b"1234"), "known type"),
        (safetensors({"a": tensor(-1, offsets=(0, 4))}, b"1234"), "known type and shape"),
        (safetensors({"a": tensor(*[1] * 17, offsets=(0, 4))}, b"1234"), "known type and shape"),
        (safetensors({"a": tensor(2, offsets=(0, 4))}, b"1234"), "not as long as its shape"),
        (safetensors({"a": tensor(1, offsets=(4, 0))}, b"1234"), "not as long as its shape"),
        (safetensors({"a": tensor(2**40, 2**40, offsets=(0, 4))}, b"1234"), "as its shape"),
        (safetensors({"a": tensor(1, offsets=(4, 8))}, b"12345678"), "a gap"),
        (
            safetensors({n: tensor(1, offsets=(0, 4)) for n in "ab"}, b"1234"),
            "overlap",
        ),
        (safetensors({"a": tensor(1, offsets=(0, 4))}, b"123"), "copy it again"),
        (safetensors({"a": tensor(1, offsets=(0, 4))}, b"12345"), "copy it again"),
    ],
)
def test_a_header_that_the_file_does_not_bear_out_is_refused(
    tmp_path: Path, data: bytes, said: str
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)

    with pytest.raises(HfFileError, match=said):
        read_tensors(path, path.name)


def test_tensors_of_every_width_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = {
        "__metadata__": {"format": "pt"},
        "half": tensor(3, 1, offsets=(0, 6), dtype="BF16"),
        "packed": tensor(4, offsets=(6, 8), dtype="F4"),
        "none": tensor(0, 7, offsets=(8, 8)),
        "scalar": tensor(offsets=(8, 12)),
    }
    path.write_bytes(safetensors(header, bytes(12)))

    assert read_tensors(path, path.name) == {
        "half": Tensor("BF16", (3, 1)),
        "packed": Tensor("F4", (4,)),
        "none": Tensor("F32", (0, 7)),
        "scalar": Tensor("F32", ()),
    }


@settings(deadline=None, max_examples=40)
@given(place=st.integers(0, 400), value=st.integers(0, 255))
def test_a_damaged_header_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    shapes = {f"t{row}": tensor(2, 2, offsets=(row * 16, row * 16 + 16)) for row in range(4)}
    data = bytearray(safetensors(shapes, bytes(64)))
    data[place % len(data)] = value
    path.write_bytes(data)

    try:
        found = read_tensors(path, path.name)
    except HfFileError:
        return
    assert sum(len(tensor.shape) == 2 for tensor in found.values()) <= 4


BY_HAND = (
    r"LC_ALL=C ls | grep -E '\.(json|jinja|safetensors)$' | xargs -d '\n' sha256sum -- | sha256sum"
)


def test_the_digest_of_a_directory_can_be_made_by_hand(directory: Directory) -> None:
    names = ("a b.json", "Z.json", "_x.jinja", "a-b.json", "a.jinja", "big.safetensors", "é.md")
    for name in names:
        directory.write(name, name.encode() * 7)
    directory.write("readme.md")
    directory.write(".hidden.json")
    told: list[float] = []

    found = digest_of(directory.folder, told.append)

    by_hand = subprocess.run(
        ["sh", "-c", BY_HAND], cwd=directory.folder, capture_output=True, check=True, text=True
    )
    assert found == f"sha256:{by_hand.stdout.split()[0]}"
    assert told == sorted(told)
    assert told[-1] == 1.0

    directory.write("readme.md", b"other")
    assert digest_of(directory.folder, told.append) == found
    directory.write("a.jinja", b"other")
    assert digest_of(directory.folder, told.append) != found


def test_a_digest_can_be_stopped_between_two_blocks(directory: Directory) -> None:
    directory.write("big.safetensors", bytes(BLOCK_BYTES * 2))
    stop = threading.Event()
    told: list[float] = []

    def tell(share: float) -> None:
        told.append(share)
        stop.set()

    with pytest.raises(DigestStopped):
        digest_of(directory.folder, tell, stop)
    assert max(told) < 1.0


@pytest.mark.parametrize("name", ["a\nb.json", "a\\b.json", "é.json"])
def test_names_that_a_listing_would_escape_have_no_digest(directory: Directory, name: str) -> None:
    directory.write(name)

    with pytest.raises(EngineStartError, match="no plain name"):
        digest_of(directory.folder, lambda _: None)


def test_a_link_out_of_the_directory_has_no_digest(directory: Directory) -> None:
    (directory.folder.parent / "outside").write_text("{}")
    (directory.folder / "x.json").symlink_to("../outside")

    with pytest.raises(EngineStartError, match="is a link that leads out"):
        digest_of(directory.folder, lambda _: None)
