"""From a checked execution to what the engine is asked for. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2

from services.worker.engine.base import Constraint, EngineRequest, Sampling

_BITS_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def seed_of(seed: int, output: int) -> int:
    """Returns the seed of an output: output 0 has the request's.

    The others have the numbers that SplitMix64 (Steele, Lea and Flood, 2014) draws from it, so that
    outputs of requests with neighbouring seeds have nothing in common.
    """
    if output == 0:
        return seed
    mixed = (seed + output * _GOLDEN) & _BITS_64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _BITS_64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _BITS_64
    return mixed ^ (mixed >> 31)


def count_of(execution: engine_pb2.Execution) -> int:
    """Returns how many outputs an execution has."""
    return execution.output.count if execution.output.HasField("count") else 1


def engine_requests(
    execution: engine_pb2.Execution,
    prompt_ids: Sequence[int],
    *,
    max_output_tokens: int,
    constraint: Constraint | None,
    has_cache: bool,
) -> tuple[EngineRequest, ...]:
    """Makes the requests of all outputs; an adapter is not among what they say yet.

    Args:
        execution: checked.
        prompt_ids: of its prompt.
        max_output_tokens: of each output.
        constraint: compiled.
        has_cache: whether the prefix cache is read: an operator may have switched it off.
    """
    stop, output = execution.stop, execution.output
    first = EngineRequest(
        prompt_ids=tuple(prompt_ids),
        continue_ids=tuple(execution.continue_token_ids),
        max_output_tokens=max_output_tokens,
        stop_token_ids=frozenset(stop.stop_token_ids),
        # The text layer looks for all of them in all of the output, so an engine that ends where
        # one is complete ends where the output does.
        stop_texts=tuple(dict.fromkeys(stop.stop_sequences)),
        ignore_eos=stop.ignore_eos,
        sampling=_sampling(execution.sampling),
        min_output_tokens=min(stop.min_output_tokens, max_output_tokens),
        constraint=constraint,
        top_logprobs=output.top_logprobs if output.return_logprobs else None,
        prompt_logprobs=output.return_prompt_logprobs,
        cache_salt=execution.cache_salt,
        reads_cache=has_cache and not execution.bypass_cache,
        is_background=execution.priority == generation_pb2.PRIORITY_CLASS_BACKGROUND,
    )
    count = count_of(execution)
    if count == 1:
        return (first,)
    seed = first.sampling.seed
    others = (
        dataclasses.replace(
            first,
            sampling=dataclasses.replace(first.sampling, seed=seed_of(seed, number)),
            # What is said of the prompt is said once.
            prompt_logprobs=False,
        )
        for number in range(1, count)
    )
    return (first, *others)


def _sampling(sampling: generation_pb2.SamplingOptions) -> Sampling:
    bias = sampling.logit_bias
    return Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        min_p=sampling.min_p,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        repetition_penalty=(
            sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0
        ),
        logit_bias=tuple(sorted(bias.items())) if bias else (),
    )
