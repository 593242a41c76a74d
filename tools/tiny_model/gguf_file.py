"""The export: weights and tokenizer as one GGUF file that llama.cpp and TensorRT-LLM tools read.

It needs the library `gguf` (the optional extra `train`). It writes one file, whole or not at all,
and nothing about the machine or the moment: equal weights give an equal file.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tools.tiny_model.chat_format import (
    BEGIN_OF_TEXT,
    CHAT_TEMPLATE,
    END_OF_TEXT,
    PADDING,
    SPECIAL_TOKENS,
    TURN_END,
)
from tools.tiny_model.network import Network, Shape

MODEL_NAME = "maas-tiny-story"
PRE_TOKENIZER = "gpt-2"

Weights = dict[str, NDArray[np.float32]]


class Precision(Enum):
    """How matrices are stored; vectors are always float32."""

    FLOAT32 = "f32"
    EIGHT_BITS = "q8_0"


_FILE_TYPES = {
    Precision.FLOAT32: gguf.LlamaFileType.ALL_F32,
    Precision.EIGHT_BITS: gguf.LlamaFileType.MOSTLY_Q8_0,
}


def write_model(path: Path, network: Network, tokenizer: Tokenizer, precision: Precision) -> None:
    """Write the model to `path`, replacing the file in one step."""
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _add_description(writer, precision)
    _add_shape(writer, network.shape)
    _add_tokenizer(writer, tokenizer)
    for name, tensor in named_tensors(network).items():
        _add_tensor(writer, name, tensor, precision)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)


def named_tensors(network: Network) -> Weights:
    """Return the weights under llama.cpp's names, each (outputs, inputs), in a fixed order."""
    state = {name: value.detach().float().numpy() for name, value in network.state_dict().items()}
    shape = network.shape
    tensors = {"token_embd.weight": state["embedding.weight"]}
    for layer in range(shape.layers):
        block, target = f"blocks.{layer}", f"blk.{layer}"
        query = state[f"{block}.attention.query.weight"]
        key = state[f"{block}.attention.key.weight"]
        tensors |= {
            f"{target}.attn_norm.weight": state[f"{block}.attention_norm.weight"],
            f"{target}.attn_q.weight": as_neighbours(query, shape.heads),
            f"{target}.attn_k.weight": as_neighbours(key, shape.key_heads),
            f"{target}.attn_v.weight": state[f"{block}.attention.value.weight"],
            f"{target}.attn_output.weight": state[f"{block}.attention.output.weight"],
            f"{target}.ffn_norm.weight": state[f"{block}.forward_norm.weight"],
            f"{target}.ffn_gate.weight": state[f"{block}.feed_forward.gate.weight"],
            f"{target}.ffn_up.weight": state[f"{block}.feed_forward.up.weight"],
            f"{target}.ffn_down.weight": state[f"{block}.feed_forward.down.weight"],
        }
    return tensors | {
        "output_norm.weight": state["norm.weight"],
        "output.weight": state["head.weight"],
    }


def as_neighbours(matrix: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Return `matrix` with the rotary rows i and i + half of each head moved next to each other.

    Scores are sums over the rows of a head, so the same order in query and key changes nothing.
    """
    rows, columns = matrix.shape
    halves = matrix.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.transpose(0, 2, 1, 3).reshape(rows, columns))


def _add_description(writer: gguf.GGUFWriter, precision: Precision) -> None:
    writer.add_type("model")
    writer.add_name(MODEL_NAME)
    writer.add_description("Very small model of short stories for children; made for tests.")
    writer.add_license("apache-2.0")
    writer.add_languages(["en"])
    writer.add_tags(["text-generation"])
    writer.add_file_type(_FILE_TYPES[precision])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_shape(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_heads)
    writer.add_key_length(shape.head_width)
    writer.add_value_length(shape.head_width)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(shape.rope_base)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    description: dict[str, Any] = json.loads(tokenizer.to_str())
    ids = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    ordered = sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda pair: pair[1])
    kinds = [
        gguf.TokenType.CONTROL if token in ids else gguf.TokenType.NORMAL for token, _ in ordered
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list([token for token, _ in ordered])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in description["model"]["merges"]])
    writer.add_bos_token_id(ids[BEGIN_OF_TEXT])
    writer.add_eos_token_id(ids[END_OF_TEXT])
    writer.add_eot_token_id(ids[TURN_END])
    writer.add_pad_token_id(ids[PADDING])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, tensor: NDArray[np.float32], precision: Precision
) -> None:
    if precision is Precision.FLOAT32 or tensor.ndim == 1:
        writer.add_tensor(name, tensor)
        return
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
