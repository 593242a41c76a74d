"""What a whole result may be: one message that clients in every language take. Pure.

Text alone comes near it in no model of today; log-probabilities do. What is going to be larger, if
all tokens are made that were asked for, is refused before anything is charged. What outgrows it all
the same, by tokens of many bytes, ends when it does (rich_generation.py).
"""

from __future__ import annotations

from maas.inference.v1 import generation_pb2

from libs.errors import FieldRule, invalid_field

# 4 MiB, above which clients refuse an answer by default, less what stands around the outputs.
WHOLE_BYTES_MAX = 4 * 1024 * 1024 - 1024
# What a token adds to each column that it is in, as vocabularies of today are.
_ID_BYTES = 3
_LOGPROB_BYTES = 4
_SPELT_BYTES = 8


def check(
    spec: generation_pb2.GenerationSpec,
    *,
    count: int,
    max_output_tokens: int,
    input_tokens: int = 0,
) -> None:
    """Sees that what is asked for beside the text fits into one answer.

    Args:
        spec: what to generate.
        count: outputs.
        max_output_tokens: most tokens of each output.
        input_tokens: of the prompt; 0 while they are not known.

    Raises:
        InvalidArgument: it may not fit; names what takes most of it.
    """
    if not spec.HasField("output"):
        return
    output = spec.output
    of_prompt = input_tokens * _prompt_token_bytes(output)
    of_outputs = count * max_output_tokens * _output_token_bytes(output)
    size = of_prompt + of_outputs
    if size <= WHOLE_BYTES_MAX:
        return
    field = "return_prompt_logprobs" if of_prompt > of_outputs else _largest(output)
    raise invalid_field(
        f"spec.output.{field}",
        FieldRule.OUT_OF_RANGE,
        f"makes a result of some {size} bytes, and one answer has at most {WHOLE_BYTES_MAX}: "
        "ask for a stream, or for fewer tokens",
    )


def _prompt_token_bytes(output: generation_pb2.OutputOptions) -> int:
    if not output.return_prompt_logprobs:
        return 0
    return _scored_bytes(output)


def _output_token_bytes(output: generation_pb2.OutputOptions) -> int:
    size = _ID_BYTES if output.return_token_ids else 0
    if output.return_logprobs:
        size += _scored_bytes(output)
    elif output.return_token_bytes:
        size += _ID_BYTES + _SPELT_BYTES
    return size


def _scored_bytes(output: generation_pb2.OutputOptions) -> int:
    spelt = _SPELT_BYTES if output.return_token_bytes else 0
    return (1 + output.top_logprobs) * (_ID_BYTES + _LOGPROB_BYTES + spelt)


def _largest(output: generation_pb2.OutputOptions) -> str:
    if output.return_logprobs:
        return "top_logprobs" if output.top_logprobs else "return_logprobs"
    return "return_token_bytes" if output.return_token_bytes else "return_token_ids"
