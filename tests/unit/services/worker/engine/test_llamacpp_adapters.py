"""Which adapters are in memory, and which files are refused before llama.cpp sees them."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from services.worker.engine.base import Adapter, AdapterUnusable
from services.worker.engine.gguf import Description, describe
from services.worker.engine.llamacpp_adapter_file import check_adapter_file
from services.worker.engine.llamacpp_adapters import AdapterShelf

MODEL = Path(__file__).parents[5] / "services" / "worker" / "models" / "maas-tiny-story.gguf"


def adapter_of(number: int, *, name: str = "", path: Path | None = Path("a.gguf")) -> Adapter:
    return Adapter(name=name or f"adapters/{number}", path=path, digest=f"sha256:{number}")


class Loader:
    """Remembers what is in memory."""

    def __init__(self) -> None:
        self.loaded: dict[int, str] = {}
        self.checked: list[str] = []
        self.loads = 0

    def check_adapter(self, adapter: Adapter) -> None:
        self.checked.append(adapter.name)
        if adapter.name == "adapters/bad":
            raise AdapterUnusable("it does not fit")

    def load_adapter(self, adapter: Adapter) -> int:
        self.loads += 1
        self.loaded[self.loads] = adapter.digest
        return self.loads

    def free_adapter(self, handle: int) -> None:
        del self.loaded[handle]


def test_equal_digests_are_loaded_once_under_all_their_names() -> None:
    loader = Loader()
    shelf = AdapterShelf(loader)

    shelf.load(adapter_of(1))
    shelf.load(adapter_of(1, name="adapters/same"))
    shelf.load(adapter_of(1))

    assert loader.loads == 1
    assert shelf.names == ("adapters/1", "adapters/same")


def test_the_one_unused_for_longest_goes_and_those_in_use_stay() -> None:
    loader = Loader()
    shelf = AdapterShelf(loader, resident_max=3)
    for number in (1, 2, 3):
        shelf.load(adapter_of(number))
    shelf.take(adapter_of(1))
    shelf.load(adapter_of(2))

    shelf.load(adapter_of(4))

    assert set(loader.loaded.values()) == {"sha256:1", "sha256:2", "sha256:4"}
    assert shelf.names == ("adapters/1", "adapters/2", "adapters/4")


def test_the_time_of_use_is_when_it_ends() -> None:
    shelf = AdapterShelf(Loader(), resident_max=2)
    shelf.take(adapter_of(1))
    shelf.load(adapter_of(2))
    shelf.give_back(adapter_of(1))

    shelf.load(adapter_of(3))

    assert shelf.names == ("adapters/1", "adapters/3")


def test_a_dropped_one_is_loaded_again_when_it_is_taken() -> None:
    loader = Loader()
    shelf = AdapterShelf(loader, resident_max=1)
    shelf.load(adapter_of(1))
    shelf.load(adapter_of(2))

    shelf.take(adapter_of(1))

    assert list(loader.loaded.values()) == ["sha256:1"]
    assert shelf.handle_of("sha256:1") == 3


def test_when_all_are_in_use_another_one_is_only_checked() -> None:
    loader = Loader()
    shelf = AdapterShelf(loader, resident_max=1)
    shelf.take(adapter_of(1))

    shelf.load(adapter_of(2))

    assert not shelf.has_room_for(adapter_of(2))
    assert shelf.has_room_for(adapter_of(1))
    assert loader.checked == ["adapters/1", "adapters/2"]
    assert shelf.names == ("adapters/1",)
    with pytest.raises(AdapterUnusable, match="does not fit"):
        shelf.load(adapter_of(3, name="adapters/bad"))
    shelf.give_back(adapter_of(1))
    assert shelf.has_room_for(adapter_of(2))


def test_an_unusable_one_costs_nobody_a_place() -> None:
    loader = Loader()
    shelf = AdapterShelf(loader, resident_max=1)
    shelf.load(adapter_of(1))

    for adapter in (adapter_of(2, name="adapters/bad"), adapter_of(3, path=None)):
        with pytest.raises(AdapterUnusable):
            shelf.load(adapter)

    assert shelf.names == ("adapters/1",)


# Files.


@pytest.fixture(scope="module")
def model() -> Description:
    return describe(MODEL)


class Draft:
    """An adapter that fits; a test spoils one thing."""

    def __init__(self) -> None:
        self.fields: dict[str, str] = {"general.type": "adapter", "adapter.type": "lora"}
        self.architecture = "llama"
        self.has_alpha = True
        self.doubles: dict[str, float] = {}
        self.lists: dict[str, list[int]] = {}
        rows, columns, rank = 128, 256, 4
        self.tensors = {
            "blk.0.attn_v.weight.lora_a": np.zeros((rank, columns), np.float32),
            "blk.0.attn_v.weight.lora_b": np.zeros((rows, rank), np.float32),
        }

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.architecture)
        for name, value in self.fields.items():
            writer.add_string(name, value)
        if self.has_alpha:
            writer.add_float32("adapter.lora.alpha", 8.0)
        for name, number in self.doubles.items():
            writer.add_float64(name, number)
        for name, numbers in self.lists.items():
            writer.add_array(name, numbers)
        for name, tensor in self.tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


A, B = "blk.0.attn_v.weight.lora_a", "blk.0.attn_v.weight.lora_b"


def spoil_type(draft: Draft) -> None:
    draft.fields["general.type"] = "model"


def spoil_kind(draft: Draft) -> None:
    draft.fields["adapter.type"] = "ia3"


def spoil_architecture(draft: Draft) -> None:
    draft.architecture = "gpt2"


def spoil_alpha(draft: Draft) -> None:
    draft.has_alpha = False


def spoil_alpha_type(draft: Draft) -> None:
    # llama.cpp ends the process when it reads this one.
    draft.has_alpha = False
    draft.doubles["adapter.lora.alpha"] = 8.0


def spoil_alignment(draft: Draft) -> None:
    draft.fields["general.alignment"] = "wide"


def spoil_invocation(draft: Draft) -> None:
    draft.lists["adapter.alora.invocation_tokens"] = [1, 2]


def spoil_tensors(draft: Draft) -> None:
    draft.tensors = {}


def spoil_name(draft: Draft) -> None:
    draft.tensors["blk.0.attn_v.weight.other"] = draft.tensors[A]


def spoil_layer(draft: Draft) -> None:
    draft.tensors = {name.replace("blk.0", "blk.9"): data for name, data in draft.tensors.items()}


def spoil_pair(draft: Draft) -> None:
    del draft.tensors[B]


def spoil_columns(draft: Draft) -> None:
    draft.tensors[A] = np.zeros((4, 255), np.float32)


def spoil_rows(draft: Draft) -> None:
    draft.tensors[B] = np.zeros((129, 4), np.float32)


def spoil_rank(draft: Draft) -> None:
    draft.tensors[B] = np.zeros((128, 5), np.float32)


def spoil_dimensions(draft: Draft) -> None:
    draft.tensors[A] = np.zeros((1, 4, 256), np.float32)


def spoil_target(draft: Draft) -> None:
    draft.tensors = {
        name.replace("attn_v", "attn_norm"): data for name, data in draft.tensors.items()
    }


def spoil_numbers(draft: Draft) -> None:
    draft.tensors[A] = np.zeros((4, 256), np.int32)


def test_an_adapter_that_fits_is_taken(tmp_path: Path, model: Description) -> None:
    check_adapter_file(Draft().write(tmp_path / "a.gguf"), model)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_type, "general.type is not 'adapter'"),
        (spoil_kind, "adapter.type is not 'lora'"),
        (spoil_architecture, "general.architecture is not 'llama'"),
        (spoil_alpha, "no adapter.lora.alpha"),
        (spoil_alpha_type, "no adapter.lora.alpha in 32 bits"),
        (spoil_alignment, "impossible alignment"),
        (spoil_invocation, "behind an invocation"),
        (spoil_tensors, "no tensors"),
        (spoil_name, "no part of a LoRA"),
        (spoil_layer, "the model has no tensor"),
        (spoil_pair, "only half"),
        (spoil_columns, "does not have the model's shape"),
        (spoil_rows, "does not have the model's shape"),
        (spoil_rank, "does not have the model's shape"),
        (spoil_dimensions, "no pair of matrices"),
        (spoil_target, "no pair of matrices"),
        (spoil_numbers, "none of F32, F16, BF16 and Q8_0"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, model: Description, spoil: Callable[[Draft], None], message: str
) -> None:
    draft = Draft()
    spoil(draft)

    with pytest.raises(AdapterUnusable, match=message):
        check_adapter_file(draft.write(tmp_path / "a.gguf"), model)


def test_a_model_is_no_adapter(model: Description) -> None:
    with pytest.raises(AdapterUnusable, match=r"general\.type"):
        check_adapter_file(MODEL, model)


def test_a_missing_file_is_refused_without_its_path(tmp_path: Path, model: Description) -> None:
    with pytest.raises(AdapterUnusable, match="No such file") as failure:
        check_adapter_file(tmp_path / "secret-place.gguf", model)

    assert "secret-place" not in str(failure.value)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path, model: Description) -> None:
    whole = Draft().write(tmp_path / "a.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 500, 7), len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(AdapterUnusable):
            check_adapter_file(cut, model)


def test_lengths_that_the_file_cannot_have_are_not_believed(
    tmp_path: Path, model: Description
) -> None:
    whole = bytearray(Draft().write(tmp_path / "a.gguf").read_bytes())
    bad = tmp_path / "bad.gguf"
    for place in (8, 16, 24):  # Tensors, fields, and the length of the first name.
        spoiled = bytearray(whole)
        struct.pack_into("<Q", spoiled, place, 2**62)
        bad.write_bytes(spoiled)
        with pytest.raises(AdapterUnusable, match="not complete"):
            check_adapter_file(bad, model)


def test_a_file_of_very_many_parts_is_refused_before_they_are_read(
    tmp_path: Path, model: Description
) -> None:
    many = tmp_path / "many.gguf"
    # A field of millions of empty texts.
    texts = 2_000_001
    head = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q1sII", 1, b"t", 9, 8)
    many.write_bytes(head + struct.pack("<Q", texts) + bytes(8 * texts))

    with pytest.raises(AdapterUnusable, match="too many parts"):
        check_adapter_file(many, model)


def test_a_file_with_changed_bytes_is_taken_or_refused_and_nothing_else(
    tmp_path: Path, model: Description
) -> None:
    whole = Draft().write(tmp_path / "a.gguf").read_bytes()
    bad = tmp_path / "bad.gguf"
    rng = random.Random(3)  # noqa: S311 - no secret
    refused = 0
    for _ in range(500):
        spoiled = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            spoiled[rng.randrange(400)] = rng.randrange(256)
        bad.write_bytes(spoiled)
        try:
            check_adapter_file(bad, model)
        except AdapterUnusable:
            refused += 1
    assert refused > 300
