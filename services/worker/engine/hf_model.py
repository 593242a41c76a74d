"""What a Hugging Face model directory says of its model, read and checked before anything loads it.

Never: reads the data of weights (but for their digest, see hf_digest.py), runs code that stands in
the directory, or unpickles anything.

Code in the directory. `auto_map` in config.json names classes in files beside it. Many models that
an engine has built in still carry one from the time before, so it does not speak against a model
that also says what it is (model_type, architectures): it is loaded by that, and the code stays
where it is. One that says nothing else is refused. What `auto_map` says of a tokenizer does not
matter where there is a tokenizer.json, and there has to be one.

Left out. Files of models that see as well leave out what is the default of their class. What can be
counted in the weights is counted there; what cannot is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.worker.engine.base import EngineStartError
from services.worker.engine.hf_config import (
    named_tokens,
    read_config,
    rows_of,
    size_in,
)
from services.worker.engine.hf_files import (
    TOKENIZER_BYTES_MAX,
    HfFileError,
    int_in,
    read_json,
    require_json,
    text_in,
)
from services.worker.engine.hf_vocabulary import find_token_id
from services.worker.engine.hf_weights import HfWeights, read_weights

if TYPE_CHECKING:
    # The engine's own Python has no libs.
    from libs.chat_rules import JsonObject, JsonValue

CONTEXT_MAX: Final = 1 << 30

_CONTEXT: Final = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HfModel:
    """A model directory that has been checked.

    Attributes:
        directory: of the model.
        model_type: as "llama".
        architectures: as "LlamaForCausalLM"; at least one.
        context_length: prompt and output together, tokens; None where no file says.
        vocabulary_size: rows of the vocabulary: token ids are below it.
        eos_ids: token ids that end an output, ascending; at least one.
        eos_id: of them, the one that the tokenizer calls the end, or else config.json.
        hidden_size: numbers between two layers.
        layers: of the model.
        heads: of attention; None where no file says, as for the next three.
        key_heads: of keys and values.
        head_size: numbers of a head; those of models that compress their heads differ.
        inner_size: numbers inside the projections of a dense layer.
        weight_bytes: of all files of weights.
        names_code: config.json names code beside it, which is not run.
        matrices: see HfWeights.
    """

    directory: Path
    model_type: str
    architectures: tuple[str, ...]
    context_length: int | None
    vocabulary_size: int
    eos_ids: tuple[int, ...]
    eos_id: int
    hidden_size: int
    layers: int
    heads: int | None
    key_heads: int | None
    head_size: int | None
    inner_size: int | None
    weight_bytes: int
    names_code: bool
    matrices: Mapping[str, tuple[int, int] | None] = field(repr=False)

    def context_within(self, wanted: int | None) -> int:
        """Returns the context to serve: what an operator wants, but not more than the model has.

        Raises:
            EngineStartError: neither says anything.
        """
        known = [length for length in (wanted, self.context_length) if length is not None]
        if not known:
            raise EngineStartError(
                f"no file of the model in {self.directory} says how long its context is: set "
                "worker.context_length"
            )
        return min(known)


def read_model(directory: Path) -> HfModel:
    """Reads and checks a model directory: its configuration, and what its weights are.

    Takes up to a second or two for the largest models: call it off the event loop.

    The context is what config.json calls it. Where positions are scaled, most files say what comes
    of it. Those that do not (YaRN that is to be switched on) are served with what they say: an
    operator who wants more writes it there.

    Raises:
        EngineStartError: with what to do about it.
    """
    try:
        return _read(directory)
    except HfFileError as error:
        raise EngineStartError(f"the model in {directory} is unusable: {error}") from None


def _read(directory: Path) -> HfModel:
    config = read_config(directory)
    _require_built_in(config)
    weights = read_weights(directory)
    rows = rows_of(config, lambda: weights)
    eos_ids = _eos_ids_of(directory, config, rows)
    hidden_size = _hidden_size_of(config, weights)
    heads = size_in(config, "num_attention_heads")
    return HfModel(
        directory=directory,
        model_type=text_in(config.get("model_type")),
        architectures=_architectures_of(config),
        context_length=_context_of(config),
        vocabulary_size=rows,
        eos_ids=tuple(sorted(set(eos_ids))),
        eos_id=eos_ids[0],
        hidden_size=hidden_size,
        layers=size_in(config, "num_hidden_layers") or weights.layers,
        heads=heads,
        key_heads=size_in(config, "num_key_value_heads") or heads,
        head_size=size_in(config, "head_dim") or (hidden_size // heads if heads else None),
        inner_size=size_in(config, "intermediate_size"),
        weight_bytes=weights.size,
        names_code="auto_map" in config,
        matrices=weights.matrices,
    )


def _require_built_in(config: JsonObject) -> None:
    """Refuses a model of which only code beside it knows what it is."""
    if text_in(config.get("model_type")) and _architectures_of(config):
        return
    if "auto_map" in config:
        raise HfFileError(
            "config.json names code of its own (auto_map) and no model_type and architectures; "
            "such code is never run"
        )
    raise HfFileError("config.json has no model_type and architectures")


def _architectures_of(config: JsonObject) -> tuple[str, ...]:
    value = config.get("architectures")
    return (
        tuple(text_in(item) for item in value if text_in(item)) if isinstance(value, list) else ()
    )


def _context_of(config: JsonObject) -> int | None:
    said = [size_in(config, name, CONTEXT_MAX) for name in _CONTEXT]
    return next((size for size in said if size is not None), None)


def _hidden_size_of(config: JsonObject, weights: HfWeights) -> int:
    said = size_in(config, "hidden_size")
    if said is not None:
        return said
    if weights.embedding is None:
        raise HfFileError("config.json has no hidden_size")
    return weights.embedding[1]


def _eos_ids_of(directory: Path, config: JsonObject, rows: int) -> list[int]:
    """Returns what ends an output, the token of the tokenizer first.

    Not every file knows all of them: those that end a turn often stand in generation_config.json
    only. Ids that the model has no row for cannot come, and are left out.
    """
    tokenizer = require_json(directory, "tokenizer.json", TOKENIZER_BYTES_MAX)
    settings = read_json(directory, "tokenizer_config.json") or {}
    text = named_tokens(directory, settings).get("eos_token", "")
    generation = read_json(directory, "generation_config.json") or {}
    said = [
        find_token_id(tokenizer, text) if text else None,
        *_ids_in(config.get("eos_token_id")),
        *_ids_in(generation.get("eos_token_id")),
    ]
    found = [token_id for token_id in said if token_id is not None and 0 <= token_id < rows]
    if not found:
        raise HfFileError(
            "no file says which token ends an output: write eos_token_id into "
            "generation_config.json"
        )
    return found


def _ids_in(value: JsonValue | None) -> list[int | None]:
    return [int_in(item) for item in value] if isinstance(value, list) else [int_in(value)]
