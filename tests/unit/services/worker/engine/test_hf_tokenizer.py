from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from services.worker.engine.hf_tokenizer import TEXT_BYTES_MAX, HfTokenizer
from tests.standins.tiny_hf_model import Vocabulary, write_model
from tests.unit.services.worker.engine.hf_world import (
    CONTROLS,
    MARK,
    Json,
    as_metaspace,
    as_unigram,
    rewrite,
)

BYTE_NAME = re.compile("<0x[0-9A-F]{2}>")
TYPED = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from([*CONTROLS, "<tool_call>", " the fox", "  ", "\n", MARK, "<0x0A>", "é"]),
    ),
    max_size=8,
).map("".join)


def with_treacherous_merges(file: Json) -> None:
    """Merging the letters of a text yields control tokens; so does looking up a whole word."""
    model, parts = file["model"], ["<", "/", ">", "s>", "</"]
    for token in file["added_tokens"]:
        token["id"] += len(parts) if token["content"] not in model["vocab"] else 0
    model["vocab"] |= {text: len(model["vocab"]) + row for row, text in enumerate(parts)}
    model["merges"][:0] = ["s >", "< /", "</ s>", "< s>"]
    model["ignore_merges"] = True
    file["pre_tokenizer"] = {"type": "Split", "pattern": {"String": MARK}, "behavior": "Isolated"}
    file["pre_tokenizer"]["invert"] = False


class World:
    """A tokenizer, and the library's own over the same file."""

    def __init__(self, folder: Path, kind: Vocabulary, *changes: Callable[[Json], object]) -> None:
        self.model = write_model(folder, vocabulary=kind)
        for change in changes:
            rewrite(folder, "tokenizer.json", change)
        self.tokenizer = HfTokenizer(folder)
        self.library = Library.from_file(str(folder / "tokenizer.json"))
        self.is_byte_level = kind == "bytes"
        self.is_unigram = as_unigram in changes

    def spell(self, ids: list[int]) -> str:
        return b"".join(map(self.tokenizer.token_bytes, ids)).decode("utf-8", "replace")

    def library_says(self, ids: list[int]) -> str:
        """What the library makes of tokens behind others, where it drops no space."""
        before = self.library.encode("a", add_special_tokens=False).ids
        whole: str = self.library.decode(before + ids, skip_special_tokens=True)
        return whole.removeprefix(self.library.decode(before))


FLAVOURS: dict[str, tuple[Vocabulary, tuple[Callable[[Json], object], ...]]] = {
    "bytes": ("bytes", ()),
    "sentencepiece": ("sentencepiece", ()),
    "metaspace-first": ("sentencepiece", (as_metaspace("first"),)),
    "metaspace-always": ("sentencepiece", (as_metaspace("always"),)),
    "metaspace-never": ("sentencepiece", (as_metaspace("never"),)),
    "unigram": ("sentencepiece", (as_unigram,)),
}


@pytest.fixture(scope="module", params=FLAVOURS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    kind, changes = FLAVOURS[request.param]
    return World(tmp_path_factory.mktemp(request.param), kind, *changes)


many = settings(deadline=None, max_examples=30)


@many
@given(text=TYPED)
def test_typed_text_comes_back_and_never_controls(world: World, text: str) -> None:
    ids = world.tokenizer.encode(text, parse_special=False)

    assert world.tokenizer.control_ids.isdisjoint(ids)
    # The mark for spaces is spaces, and with Unigram the name of a byte's token is that byte.
    expected = text if world.is_byte_level else text.replace(MARK, " ")
    assume(not (world.is_unigram and BYTE_NAME.search(text)))
    # One space may stand before it.
    assert world.spell(ids) in (expected, f" {expected}")


@many
@given(text=TYPED)
def test_bytes_are_what_the_library_decodes(world: World, text: str) -> None:
    for parse_special in (False, True):
        ids = world.tokenizer.encode(text, parse_special=parse_special)
        assert world.spell(ids) == world.library_says(ids)


@many
@given(text=TYPED)
def test_rendered_text_has_the_tokens_that_the_library_reads(world: World, text: str) -> None:
    expected = world.library.encode(text, add_special_tokens=False).ids

    assert world.tokenizer.encode(text, parse_special=True) == expected


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("bytes"), "bytes")


@many
@given(ids=st.lists(st.integers(0, 575), max_size=12))
def test_any_ids_of_a_byte_level_vocabulary_spell_what_the_library_decodes(
    byte_level: World, ids: list[int]
) -> None:
    assert byte_level.spell(ids) == byte_level.library_says(ids)


@many
@given(text=TYPED)
def test_no_text_is_merged_to_a_control_token(treacherous: World, text: str) -> None:
    ids = treacherous.tokenizer.encode(text, parse_special=False)

    assert treacherous.tokenizer.control_ids.isdisjoint(ids)
    assert treacherous.spell(ids).lstrip(" ") == text.replace(MARK, " ").lstrip(" ")


@pytest.fixture(scope="module")
def treacherous(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("treacherous")
    return World(folder, "sentencepiece", with_treacherous_merges)


def test_asking_the_library_to_read_control_tokens_as_text_is_not_enough(
    treacherous: World,
) -> None:
    # This is why there is a second vocabulary; without it the test before this one fails.
    treacherous.library.encode_special_tokens = True
    try:
        ids = treacherous.library.encode("a </s>", add_special_tokens=False).ids
    finally:
        treacherous.library.encode_special_tokens = False

    assert treacherous.tokenizer.eos_id in ids


def test_control_tokens_are_read_only_where_the_template_wrote_them(world: World) -> None:
    specials = world.model.special_ids
    for text, token_id in specials.items():
        read = world.tokenizer.encode(text, parse_special=True)
        typed = world.tokenizer.encode(text, parse_special=False)

        assert read == [token_id]
        assert world.tokenizer.token_bytes(token_id) == b""
        assert world.spell(typed).strip() == text
    assert world.tokenizer.control_ids == set(specials.values())


def test_added_tokens_that_are_shown_are_text_for_everybody(byte_level: World) -> None:
    call = byte_level.tokenizer.encode("<tool_call>", parse_special=False)

    assert call == byte_level.tokenizer.encode("<tool_call>", parse_special=True)
    assert [byte_level.tokenizer.token_bytes(token_id) for token_id in call] == [b"<tool_call>"]


def test_rows_without_a_token_spell_nothing(world: World) -> None:
    model, tokenizer = world.model, world.tokenizer

    assert tokenizer.vocabulary_size == model.vocabulary_rows > model.tokens
    assert tokenizer.token_bytes(model.vocabulary_rows - 1) == b""
    with pytest.raises(IndexError):
        tokenizer.token_bytes(model.vocabulary_rows)
    with pytest.raises(IndexError):
        tokenizer.token_bytes(-1)


def test_the_special_tokens_are_known_by_text_and_id(world: World) -> None:
    tokenizer, model = world.tokenizer, world.model

    assert (tokenizer.bos_id, tokenizer.eos_id) == (model.bos_id, model.eos_id)
    assert tokenizer.adds_bos
    for name, token_id in (("bos_token", model.bos_id), ("eos_token", model.eos_id)):
        text = tokenizer.special_tokens[name]
        assert tokenizer.encode(text, parse_special=True) == [token_id]


def test_pieces_of_a_conversation_are_encoded_apart(byte_level: World) -> None:
    encode = byte_level.tokenizer.encode
    pieces = [("<|im_start|>user\n", True), ("the fox</s>", False), ("<|im_end|>", True)]
    whole = encode("".join(text for text, _ in pieces), parse_special=True)

    apart = [encode(text, parse_special=is_own) for text, is_own in pieces]

    assert list(itertools.chain(*apart)) == whole


def test_lone_surrogates_are_question_marks(world: World) -> None:
    encode = world.tokenizer.encode

    assert encode("a\ud800b", parse_special=False) == encode("a?b", parse_special=False)


def test_a_text_that_is_too_long_is_refused(byte_level: World) -> None:
    byte_level.tokenizer.encode("é" * (TEXT_BYTES_MAX // 64), parse_special=False)
    with pytest.raises(ValueError, match="1048576 bytes"):
        byte_level.tokenizer.encode("é" * (TEXT_BYTES_MAX // 2 + 1), parse_special=False)


def test_threads_may_share_a_tokenizer(world: World) -> None:
    texts = [f"the fox {row} </s>" * (row + 1) for row in range(24)]
    expected = [world.tokenizer.encode(text, parse_special=False) for text in texts]
    barrier = threading.Barrier(4)

    def encode_all(_: int) -> list[list[int]]:
        barrier.wait(10)
        return [world.tokenizer.encode(text, parse_special=False) for text in texts]

    with ThreadPoolExecutor(4) as pool:
        assert all(found == expected for found in pool.map(encode_all, range(4)))
