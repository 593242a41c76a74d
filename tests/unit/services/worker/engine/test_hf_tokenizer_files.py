from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.standins.tiny_hf_model import write_model
from tests.unit.services.worker.engine.hf_world import Directory, Json, as_unigram, read, rewrite


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    write_model(tmp_path, vocabulary="sentencepiece")
    return Directory(tmp_path)


@pytest.mark.parametrize(
    ("said", "has_template", "expected"),
    [
        (True, False, True),
        (False, True, False),
        (None, True, True),
        (None, False, False),
    ],
)
def test_whether_prompts_begin_with_bos_is_said_or_seen(
    directory: Directory,
    said: bool | None,  # noqa: FBT001
    has_template: bool,  # noqa: FBT001
    expected: bool,  # noqa: FBT001
) -> None:
    directory.change("tokenizer_config.json", add_bos_token=said)
    if not has_template:
        directory.change("tokenizer.json", post_processor=None)

    tokenizer = directory.read()

    assert tokenizer.adds_bos is expected
    assert tokenizer.encode("the", parse_special=True) == tokenizer.encode(
        "the", parse_special=False
    )


def test_a_model_without_bos_adds_none(directory: Directory) -> None:
    directory.change("tokenizer_config.json", bos_token=None, add_bos_token=True)

    tokenizer = directory.read()

    assert tokenizer.bos_id is None
    assert not tokenizer.adds_bos
    assert tokenizer.special_tokens == {"bos_token": "", "eos_token": "</s>"}


def test_older_files_name_their_tokens_elsewhere(directory: Directory) -> None:
    rewrite(directory.folder, "tokenizer_config.json", lambda file: file.pop("bos_token"))
    (directory.folder / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}}')

    assert directory.read().special_tokens["bos_token"] == "<s>"


def test_a_chat_template_in_a_file_goes_before_that_of_the_configuration(
    directory: Directory,
) -> None:
    assert directory.read().chat_template.startswith("{%- for")

    (directory.folder / "chat_template.json").write_text('{"chat_template": "json"}')
    assert directory.read().chat_template == "json"

    (directory.folder / "chat_template.jinja").write_text("jinja é", encoding="utf-8")
    assert directory.read().chat_template == "jinja é"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "only", "template": "o"}], "o"),
        ([{"name": "one", "template": "1"}, {"name": "two", "template": "2"}], ""),
        (None, ""),
        ("text", "text"),
    ],
)
def test_of_several_chat_templates_the_default_one_counts(
    directory: Directory, value: object, expected: str
) -> None:
    directory.change("tokenizer_config.json", chat_template=value)

    assert directory.read().chat_template == expected


def test_truncation_and_padding_that_training_left_are_off(directory: Directory) -> None:
    directory.change(
        "tokenizer.json",
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
    )

    assert len(directory.read().encode("the fox was here", parse_special=True)) > 2


def test_tokens_that_the_model_has_no_row_for_are_text(directory: Directory) -> None:
    ends = read(directory.folder, "tokenizer.json")["added_tokens"][-1]
    directory.change("config.json", vocab_size=ends["id"])
    assert ends["content"] == "<|im_end|>"

    tokenizer = directory.read()

    ids = tokenizer.encode("<|im_start|><|im_end|>", parse_special=True)
    assert max(ids) < tokenizer.vocabulary_size
    assert b"".join(map(tokenizer.token_bytes, ids)).strip() == b"<|im_end|>"


def test_rows_that_no_configuration_tells_are_counted_in_the_weights(
    directory: Directory,
) -> None:
    said = directory.read().vocabulary_size
    directory.change("config.json", vocab_size=None)

    assert directory.read().vocabulary_size == said


def test_what_only_the_configuration_calls_special_is_a_control_token(
    directory: Directory,
) -> None:
    def forget(file: Json) -> None:
        for token in file["added_tokens"]:
            token["special"] = False
        # The beginning of sequence is only among the texts.
        file["added_tokens"] = [
            token for token in file["added_tokens"] if token["content"] != "<s>"
        ]

    rewrite(directory.folder, "tokenizer.json", forget)
    rewrite(
        directory.folder,
        "tokenizer_config.json",
        lambda file: file["added_tokens_decoder"].pop("1"),
    )
    tokenizer = directory.read()

    assert tokenizer.control_ids == {0, 1, 2, 428, 429}
    assert tokenizer.encode("<s><|im_end|>", parse_special=True) == [1, 429]
    assert {1, 429}.isdisjoint(tokenizer.encode("<s><|im_end|>", parse_special=False))


def test_a_token_that_only_the_configuration_adds_is_known(directory: Directory) -> None:
    rewrite(
        directory.folder,
        "tokenizer_config.json",
        lambda file: file["added_tokens_decoder"].update({"430": {"content": "<think>"}}),
    )
    tokenizer = directory.read()

    assert tokenizer.encode("<think>", parse_special=False) == [430]
    assert tokenizer.token_bytes(430) == b"<think>"


def test_what_a_configuration_says_of_another_vocabulary_is_not_believed(
    directory: Directory,
) -> None:
    expected = directory.read().encode("the fox <think>", parse_special=True)
    stale = {
        "300": {"content": "<think>"},
        "440": {"content": "</think>", "special": True},
        "428": {"content": "<other>", "special": True},
    }
    rewrite(
        directory.folder,
        "tokenizer_config.json",
        lambda file: file["added_tokens_decoder"].update(stale),
    )

    assert directory.read().encode("the fox <think>", parse_special=True) == expected


def broken(name: str, **values: object) -> Callable[[Directory], None]:
    return lambda directory: directory.change(name, **values)


def removed(name: str) -> Callable[[Directory], None]:
    return lambda directory: (directory.folder / name).unlink()


def with_a_hole(directory: Directory) -> None:
    def change(file: Json) -> None:
        for token in file["added_tokens"]:
            token["id"] += token["id"] > 2

    rewrite(directory.folder, "tokenizer.json", change)


def model_of(**values: object) -> Callable[[Directory], None]:
    return lambda directory: rewrite(
        directory.folder, "tokenizer.json", lambda file: file["model"].update(values)
    )


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (removed("tokenizer.json"), "there is no tokenizer.json"),
        (removed("config.json"), "there is no config.json"),
        (broken("config.json", vocab_size=True), "config.json has no vocab_size"),
        (broken("config.json", vocab_size=300), "not of the same model"),
        (model_of(type="WordPiece"), "'WordPiece'; BPE and Unigram"),
        (model_of(type="Unigram", vocab=[["a", 0.0]], byte_fallback=False), "does not know"),
        (model_of(end_of_word_suffix="</w>"), "parts of words"),
        (model_of(merges=["a b c"]), "no pair"),
        (model_of(merges=["never there"]), "cannot be loaded"),
        (model_of(vocab={"a": -1}), "without id"),
        (broken("tokenizer.json", decoder=None), "decoder that is not supported (none)"),
        (broken("tokenizer.json", decoder={"type": "WordPiece"}), "(WordPiece)"),
        (broken("tokenizer.json", added_tokens=[{"id": 3}]), "added token without text"),
        (with_a_hole, "ids are missing"),
        (broken("tokenizer_config.json", eos_token="</nowhere>"), "'</nowhere>'"),
        (broken("tokenizer_config.json", added_tokens_decoder={"x": {}}), "without id"),
    ],
)
def test_what_is_not_understood_is_refused_at_start(
    directory: Directory, break_it: Callable[[Directory], None], said: str
) -> None:
    break_it(directory)

    assert said in directory.refusal()


def test_a_byte_level_control_token_of_one_letter_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    directory = Directory(tmp_path)

    def change(file: Json) -> None:
        file["added_tokens"].append({"id": 33, "content": "!", "special": True})

    rewrite(tmp_path, "tokenizer.json", change)

    assert "'!' for a control token" in directory.refusal()


def test_a_vocabulary_to_which_spaces_come_is_refused(directory: Directory) -> None:
    # Here the names with a space, by which no text can call control tokens, would be texts.
    rewrite(directory.folder, "tokenizer.json", as_unigram)
    directory.change("tokenizer.json", pre_tokenizer=None)

    assert "becomes a control token" in directory.refusal()
