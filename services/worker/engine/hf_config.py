"""Where values stand in config.json and tokenizer_config.json of a Hugging Face model directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.worker.engine.hf_files import (
    HfFileError,
    int_in,
    object_in,
    read_json,
    require_json,
    text_in,
)
from services.worker.engine.hf_weights import HfWeights

if TYPE_CHECKING:
    # The engine's own Python has no libs.
    from libs.chat_rules import JsonObject, JsonValue

CONTROLS: Final = ("bos_token", "eos_token", "unk_token")
"""Named tokens that control even where they were not added as special ones.

Others (padding) do so only where they were: some files pad with "!".
"""

ROWS_MAX: Final = 1 << 22
"""Most rows of a vocabulary; the largest have a quarter of a million."""

SIZE_MAX: Final = 1 << 24
"""Most of anything else that config.json counts."""

# Where models that also see or hear have what is said of the part that writes.
_TEXT_PARTS: Final = ("text_config", "llm_config", "language_config")


def read_config(directory: Path) -> JsonObject:
    """Returns config.json, of which the part about text goes before the rest.

    Raises:
        HfFileError: it is missing or no JSON.
    """
    config = require_json(directory, "config.json")
    for name in _TEXT_PARTS:
        part = config.get(name)
        if isinstance(part, dict):
            return config | part
    return config


def rows_of(config: JsonObject, weights: Callable[[], HfWeights]) -> int:
    """Returns the rows of the vocabulary.

    Args:
        config: see read_config.
        weights: reads those of the model, which are counted where config.json does not say.

    Raises:
        HfFileError: nothing says, or what says it makes no sense.
    """
    said = size_in(config, "vocab_size", ROWS_MAX)
    if said is not None:
        return said
    embedding = weights().embedding
    if embedding is None:
        raise HfFileError("config.json has no vocab_size")
    return embedding[0]


def size_in(config: JsonObject, name: str, most: int = SIZE_MAX) -> int | None:
    """Returns a number between 1 and `most`; None where there is none.

    Raises:
        HfFileError: there is something else.
    """
    if config.get(name) is None:
        return None
    value = int_in(config[name])
    if value is None or not 1 <= value <= most:
        raise HfFileError(f"config.json has no {name} between 1 and {most}")
    return value


def named_tokens(directory: Path, settings: JsonObject) -> dict[str, str]:
    """Returns the texts of named tokens, as "bos_token".

    Args:
        directory: of the model.
        settings: tokenizer_config.json, which goes before special_tokens_map.json.

    Raises:
        HfFileError: the latter cannot be read.
    """
    older = read_json(directory, "special_tokens_map.json") or {}
    found: dict[str, str] = {}
    for name in CONTROLS:
        text = _text_of_token(settings[name] if name in settings else older.get(name))
        if text:
            found[name] = text
    return found


def _text_of_token(value: JsonValue | None) -> str:
    """Returns the text of a token that is written as one, or as an object."""
    return text_in(value) or text_in(object_in(value).get("content"))
