"""What tokenizer.json says of a vocabulary: what each token spells, and which tokens control.

Two kinds are understood, which are those of all models that write text:

    bytes           byte-level BPE (GPT-2, Llama 3, Qwen, DeepSeek): a character for each byte
    marked spaces   BPE or Unigram after SentencePiece (Llama 2, Mistral, Gemma, Phi 3): a mark in
                    place of each space, and tokens <0x00> to <0xFF> for what has no other token

Control tokens are those that the file calls special, or tokenizer_config.json does, and the
beginning, end and unknown tokens. Many vocabularies list them among the texts too, so that merging
the letters of a typed "</s>" would yield the token. `plain` is the same vocabulary in which no text
yields one: there they have names with a space, which this kind of model never sees, as it is
replaced before, and no merge leads to them. All ids stay what they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from services.worker.engine.hf_files import HfFileError, int_in, object_in, objects_in, text_in
from services.worker.engine.hf_spelling import speller_of

if TYPE_CHECKING:
    # The engine's own Python has no libs.
    from libs.chat_rules import JsonObject, JsonValue

_TOKEN_PAIR: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class HfVocabulary:
    """A vocabulary that has been understood.

    Attributes:
        source: tokenizer.json for the library: all control tokens are special ones.
        plain: the same, in which no text becomes a control token once special tokens are read as
            text.
        pieces: UTF-8 bytes of each token by id; empty for control tokens and ids without token.
        ids: of all tokens by their text in the file.
        added_ids: likewise, of the added ones.
        control_ids: of the control tokens.
        plain_ids: of the added tokens by their names in `plain`.
    """

    source: str
    plain: str
    pieces: list[bytes]
    ids: dict[str, int]
    added_ids: dict[str, int]
    control_ids: frozenset[int]
    plain_ids: dict[str, int]


def read_vocabulary(
    tokenizer: JsonObject,
    *,
    rows: int,
    declared: Mapping[int, JsonObject],
    controls: frozenset[str],
) -> HfVocabulary:
    """Makes a vocabulary of what stands in tokenizer.json.

    Args:
        tokenizer: the file. Changed.
        rows: of the model's vocabulary. Added tokens from there on are left out: the model has no
            row for them, so they are text.
        declared: added tokens of tokenizer_config.json by id.
        controls: texts of the beginning, end and unknown token.

    Raises:
        HfFileError: it is of a kind that is not understood here, or contradicts itself.
    """
    model = object_in(tokenizer.get("model"))
    tokens = _tokens_of(model)
    table = dict(tokens)
    spell = speller_of(tokenizer.get("decoder")).spell
    _require_in_model(max(table.values(), default=0), rows)
    added = _added_of(tokenizer, table, declared, controls, rows)
    tokenizer["added_tokens"] = [*added]
    # Neither is wanted, and both may be left from training.
    tokenizer["truncation"] = tokenizer["padding"] = None
    pieces = [b""] * rows
    for text, token_id in tokens:
        pieces[token_id] = spell(text, is_added=False)
    for token in added:
        token_id = _id_of(token)
        is_control = token["special"] is True
        pieces[token_id] = b"" if is_control else spell(_text_of(token), is_added=True)
    added_ids = {_text_of(token): _id_of(token) for token in added}
    control_ids = frozenset(_id_of(token) for token in added if token["special"] is True)
    source = json.dumps(tokenizer)
    _hide_controls(tokenizer, model, table)
    return HfVocabulary(
        source=source,
        plain=json.dumps(tokenizer),
        pieces=pieces,
        ids=table | added_ids,
        added_ids=added_ids,
        control_ids=control_ids,
        plain_ids={_text_of(token): _id_of(token) for token in added},
    )


def find_token_id(tokenizer: JsonObject, text: str) -> int | None:
    """Returns the id of a token by its text in tokenizer.json; None when it has none."""
    for token in objects_in(tokenizer.get("added_tokens")):
        if token.get("content") == text:
            return int_in(token.get("id"))
    return dict(_tokens_of(object_in(tokenizer.get("model")))).get(text)


def _tokens_of(model: JsonObject) -> list[tuple[str, int]]:
    """Returns the model's own tokens with their ids."""
    kind = text_in(model.get("type")) or ("BPE" if "merges" in model else "")
    vocabulary = model.get("vocab")
    if kind == "BPE" and isinstance(vocabulary, dict):
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            raise HfFileError("tokenizer.json has marks for parts of words, which is not supported")
        return [(text, _valid_id(int_in(token_id))) for text, token_id in vocabulary.items()]
    if kind == "Unigram" and isinstance(vocabulary, list):
        if int_in(model.get("unk_id")) is None and model.get("byte_fallback") is not True:
            raise HfFileError("tokenizer.json has no token for what it does not know")
        return [(_first_text(item), token_id) for token_id, item in enumerate(vocabulary)]
    raise HfFileError(
        f"tokenizer.json has a model of the type {kind or 'unknown'!r}; BPE and Unigram are "
        "supported"
    )


def _first_text(item: JsonValue) -> str:
    if isinstance(item, list) and item and isinstance(item[0], str):
        return item[0]
    raise HfFileError("tokenizer.json has a token without text")


def _valid_id(token_id: int | None) -> int:
    if token_id is None or token_id < 0:
        raise HfFileError("tokenizer.json has a token without id")
    return token_id


def _id_of(token: JsonObject) -> int:
    return _valid_id(int_in(token.get("id")))


def _text_of(token: JsonObject) -> str:
    text = text_in(token.get("content"))
    if not text:
        raise HfFileError("tokenizer.json has an added token without text")
    return text


def _require_in_model(token_id: int, rows: int) -> None:
    if token_id >= rows:
        raise HfFileError(
            f"tokenizer.json has a token {token_id}, and config.json a vocab_size of {rows}: they "
            "are not of the same model"
        )


def _added_of(
    tokenizer: JsonObject,
    table: dict[str, int],
    declared: Mapping[int, JsonObject],
    controls: frozenset[str],
    rows: int,
) -> list[JsonObject]:
    """Returns the added tokens that the model knows, each with all its flags, ids ascending.

    They are those of tokenizer.json, those that only tokenizer_config.json has, and the control
    tokens that are among the model's own.
    """
    tokens = {_id_of(token): dict(token) for token in objects_in(tokenizer.get("added_tokens"))}
    _declare(tokens, table, declared)
    known = {_text_of(token) for token in tokens.values()}
    for text in sorted(controls - known):
        if text in table:
            tokens[table[text]] = {"content": text, "special": True}
    flags: JsonObject = dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized", "special"), False
    )
    return [
        {
            **flags,
            **{name: value for name, value in token.items() if name in flags},
            "id": token_id,
            "content": _text_of(token),
            "special": token.get("special") is True or token.get("content") in controls,
        }
        for token_id, token in sorted(tokens.items())
        if token_id < rows
    ]


def _declare(
    tokens: dict[int, JsonObject], table: dict[str, int], declared: Mapping[int, JsonObject]
) -> None:
    """Takes over what tokenizer_config.json says of added tokens, as far as it can be true.

    Some files still have what was true of the vocabulary that theirs was made of.
    """
    known = {_text_of(token) for token in tokens.values()}
    next_id = 1 + max([*table.values(), *tokens])
    for token_id, token in sorted(declared.items()):
        text, found = _text_of(token), tokens.get(token_id)
        if found is not None:
            is_special = token.get("special") is True and found.get("content") == text
            found["special"] = found.get("special") is True or is_special
        elif text not in known and token_id == table.get(text, next_id):
            tokens[token_id] = dict(token)
            next_id = max(next_id, token_id + 1)


def _hide_controls(tokenizer: JsonObject, model: JsonObject, table: dict[str, int]) -> None:
    """Makes control tokens unreachable from texts. Changes the file."""
    names: dict[str, str] = {}
    for token in objects_in(tokenizer["added_tokens"]):
        text = _text_of(token)
        if token["special"] is True and text in table:
            if len(text) == 1 and model.get("byte_fallback") is not True:
                raise HfFileError(f"tokenizer.json has {text!r} for a control token: it is text")
            names[text] = f" control {table[text]}"
            token["content"] = names[text]
    # It would name tokens that are not there any more, and what it adds is not wanted.
    tokenizer["post_processor"] = None
    if not names:
        return
    unknown = model.get("unk_token")
    if isinstance(unknown, str):
        model["unk_token"] = names.get(unknown, unknown)
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(text, text): value for text, value in vocabulary.items()}
        merges = model.get("merges")
        model["merges"] = list(_merges_without(names, merges if isinstance(merges, list) else []))
    elif isinstance(vocabulary, list):
        model["vocab"] = [_renamed(names, item) for item in vocabulary]


def _renamed(names: Mapping[str, str], item: JsonValue) -> JsonValue:
    text = _first_text(item)
    return [names[text], *item[1:]] if text in names and isinstance(item, list) else item


def _merges_without(names: Mapping[str, str], merges: list[JsonValue]) -> Iterator[JsonValue]:
    """Yields the merges in which no control token takes part, and that do not make one."""
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != _TOKEN_PAIR:
            raise HfFileError("tokenizer.json has a merge that is no pair")
        left, right = str(pair[0]), str(pair[1])
        if left not in names and right not in names and left + right not in names:
            yield merge
