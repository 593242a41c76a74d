"""Writes tiny Hugging Face model directories and LoRA adapters, for tests.

They have all the files of a real one, and its traps: the tokenizer puts a begin token in front when
it is asked to add special tokens, one of the ids that end an output stands nowhere but in
generation_config.json, and config.json has more rows of vocabulary than the tokenizer has tokens.

    bytes           byte-level BPE as Llama 3 and Qwen have it; the id of a byte is the byte
    sentencepiece   BPE with a mark for spaces and a fallback to bytes, as Llama 2 and Mistral have
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Vocabulary = Literal["bytes", "sentencepiece"]
Json = dict[str, object]

HIDDEN = 16
LAYERS = 2
HEADS = 2
KEY_HEADS = 1
INNER = 32
TARGET_MODULES = ("q_proj", "v_proj")
# Rows of vocabulary come in multiples, as on real models: some ids have no token.
ROWS_MULTIPLE = 64
CONTEXT = 512

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_TEXT = """
the and was that with they from said his her you not she had once upon time little one day there fox
snow house went very big girl boy mom happy play saw name is it in to of a on for an are be by as at
or if so do up out we my me no yes all but what when who how can will
"""
_WORDS = _TEXT.split()
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
_BEGIN, _END, _TEXT_END = "<|begin_of_text|>", "<|im_end|>", "<|end_of_text|>"
# Behind the words: control tokens first, then one that is shown like any text.
_SPECIALS = (_BEGIN, _TEXT_END, "<|im_start|>", _END, "<|pad|>")
_SHOWN = ("<tool_call>", "</tool_call>")


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """A model directory that has been written.

    Attributes:
        folder: the directory.
        vocabulary_rows: vocab_size of config.json; ids from `tokens` on have no token.
        tokens: of the tokenizer, added ones included.
        bos_id: that the tokenizer puts in front when asked to add special tokens.
        eos_id: of the tokenizer and of config.json: the one that engines know by themselves.
        eos_ids: of generation_config.json; `eos_id` is the first.
        special_ids: control tokens by their text.
    """

    folder: Path
    vocabulary_rows: int
    tokens: int
    bos_id: int
    eos_id: int
    eos_ids: tuple[int, ...]
    special_ids: dict[str, int]


def write_model(
    folder: Path,
    *,
    vocabulary: Vocabulary = "bytes",
    context: int = CONTEXT,
    eos_ids: tuple[int, ...] | None = None,
    seed: int = 1,
) -> TinyModel:
    """Writes a whole model directory: 10 ms.

    Args:
        folder: made where it is missing.
        vocabulary: how the tokenizer works.
        context: max_position_embeddings, tokens.
        eos_ids: of generation_config.json; the first one is the tokenizer's too, so it must be
            the id of a control token. None for two: the end of a turn and the end of a text.
        seed: of the weights; other weights say other things.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, table, specials = _BUILDERS[vocabulary]()
    texts = {token_id: text for text, token_id in table.items()}
    if eos_ids is None:
        eos_ids = tuple(specials[text] for text in _ends_of(specials))
    bos = next(text for text in (_BEGIN, "<s>") if text in specials)
    model = TinyModel(
        folder=folder,
        vocabulary_rows=-(-(len(table) + 1) // ROWS_MULTIPLE) * ROWS_MULTIPLE,
        tokens=len(table),
        bos_id=specials[bos],
        eos_id=eos_ids[0],
        eos_ids=eos_ids,
        special_ids=specials,
    )
    _write_json(folder / "tokenizer.json", tokenizer)
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(model, texts, bos))
    _write_json(folder / "config.json", _config(model, context))
    _write_json(folder / "generation_config.json", _generation_config(model))
    write_safetensors(folder / "model.safetensors", _weights(model.vocabulary_rows, seed))
    return model


def write_adapter(
    folder: Path,
    *,
    rank: int = 4,
    seed: int = 1,
    target_modules: tuple[str, ...] = TARGET_MODULES,
) -> Path:
    """Writes a LoRA adapter in the form of PEFT, for the models of `write_model`: 1 ms.

    Args:
        folder: made where it is missing; returned.
        rank: of its matrices.
        seed: of its weights; other weights change what a model says in another way.
        target_modules: which projections of each layer it changes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: Json = {
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    _write_json(folder / "adapter_config.json", config)
    rng = np.random.default_rng(seed)
    tensors: dict[str, Floats] = {}
    for layer in range(LAYERS):
        for module, (rows, columns) in _projections().items():
            if module.rpartition(".")[2] not in target_modules:
                continue
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = _random(rng, rank, columns)
            tensors[f"{name}.lora_B.weight"] = _random(rng, rows, rank)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder


def write_safetensors(path: Path, tensors: dict[str, Floats]) -> None:
    """Writes a safetensors file: eight bytes of length, a JSON header, the data."""
    header: Json = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        raw = np.ascontiguousarray(tensor, dtype="<f4").tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _write_json(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def _ends_of(specials: dict[str, int]) -> list[str]:
    return [_END, _TEXT_END] if _TEXT_END in specials else ["</s>", _END]


def _config(model: TinyModel, context: int) -> Json:
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": model.bos_id,
        "eos_token_id": model.eos_id,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "max_position_embeddings": context,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KEY_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": model.vocabulary_rows,
    }


def _generation_config(model: TinyModel) -> Json:
    return {
        "bos_token_id": model.bos_id,
        "eos_token_id": list(model.eos_ids),
        "temperature": 0.6,
        "top_p": 0.9,
    }


def _tokenizer_config(model: TinyModel, texts: dict[int, str], bos: str) -> Json:
    return {
        "add_bos_token": True,
        "added_tokens_decoder": {
            str(token_id): {"content": text, "special": True}
            for text, token_id in model.special_ids.items()
        },
        "bos_token": bos,
        # Older files say it as an object.
        "eos_token": {"__type": "AddedToken", "content": texts[model.eos_id], "special": True},
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _added(token_id: int, text: str, *, is_special: bool) -> Json:
    return {
        "id": token_id,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": is_special,
    }


def _begin_with(text: str, token_id: int) -> Json:
    """What puts a begin token in front, where special tokens are asked for."""
    begin = {"SpecialToken": {"id": text, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, begin, second],
        "special_tokens": {text: {"id": text, "ids": [token_id], "tokens": [text]}},
    }


def _grow(table: dict[str, int], words: list[str]) -> list[str]:
    """Adds words, and all their beginnings of two characters and more; returns the merges."""
    merges: list[str] = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in table:
                table[word[:end]] = len(table)
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
    return merges


def _tokenizer_json(table: dict[str, int], merges: list[str], added: list[Json]) -> Json:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(table),
            "merges": merges,
        },
    }


def _byte_characters() -> list[str]:
    """The visible character that stands for each byte in byte-level BPE."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    characters: list[str] = []
    hidden = 256
    for byte in range(256):
        characters.append(chr(byte if byte in visible else hidden))
        hidden += byte not in visible
    return characters


Built = tuple[Json, dict[str, int], dict[str, int]]
"""tokenizer.json, all tokens by text, the control tokens among them."""


def _build_bytes() -> Built:
    characters = _byte_characters()
    table = {character: byte for byte, character in enumerate(characters)}
    space = characters[32]
    words = [space + word for word in _WORDS] + [word for word in _WORDS if len(word) > 1]
    # Two characters whose bytes tokens of their own split, and one whose bytes are one token.
    words.append("".join(characters[byte] for byte in "é".encode()))
    merges = _grow(table, words)
    model = dict(table)
    for text in (*_SPECIALS, *_SHOWN):
        table[text] = len(table)
    specials = {text: table[text] for text in _SPECIALS}
    added = [
        *(_added(token_id, text, is_special=True) for text, token_id in specials.items()),
        *(_added(table[text], text, is_special=False) for text in _SHOWN),
    ]
    whole = _tokenizer_json(model, merges, added)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    whole["pre_tokenizer"] = {**byte_level, "use_regex": True}
    whole["decoder"] = {**byte_level, "use_regex": True}
    whole["post_processor"] = _begin_with(_BEGIN, specials[_BEGIN])
    return whole, table, specials


def _build_sentencepiece() -> Built:
    table = {"<unk>": 0, "<s>": 1, "</s>": 2}
    table |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    letters = sorted(
        set("".join(_WORDS)) | set(".,!?'\"") | {"\N{LATIN SMALL LETTER E WITH ACUTE}"}
    )
    for letter in (_SPACE, *letters):
        table[letter] = len(table)
    merges = _grow(table, [_SPACE + word for word in _WORDS])
    model = dict(table)
    marks = ("<|im_start|>", _END)
    for text in marks:
        table[text] = len(table)
    specials = {text: table[text] for text in ("<unk>", "<s>", "</s>", *marks)}
    added = [_added(token_id, text, is_special=True) for text, token_id in specials.items()]
    whole = _tokenizer_json(model, merges, added)
    settings = whole["model"]
    assert isinstance(settings, dict)
    settings.update(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    whole["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": _SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        ],
    }
    whole["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    whole["post_processor"] = _begin_with("<s>", specials["<s>"])
    return whole, table, specials


_BUILDERS = {"bytes": _build_bytes, "sentencepiece": _build_sentencepiece}


def _projections() -> dict[str, tuple[int, int]]:
    """Shapes (rows, columns) of what a LoRA adapter may change in a layer."""
    keys = HIDDEN // HEADS * KEY_HEADS
    return {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }


def _weights(rows: int, seed: int) -> dict[str, Floats]:
    rng = np.random.default_rng(seed)
    tensors = {"model.embed_tokens.weight": _random(rng, rows, HIDDEN)}
    for layer in range(LAYERS):
        for module, shape in _projections().items():
            tensors[f"model.layers.{layer}.{module}.weight"] = _random(rng, *shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = np.ones(HIDDEN, np.float32)
    tensors["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    tensors["lm_head.weight"] = _random(rng, rows, HIDDEN)
    return tensors


def _random(rng: np.random.Generator, rows: int, columns: int) -> Floats:
    return rng.normal(0, 0.1, (rows, columns)).astype(np.float32)
