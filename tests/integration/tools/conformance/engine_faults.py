"""The simulated engine, wrong in one way at a time, for showing that the contract notices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from services.worker.engine.base import (
    Adapter,
    Ended,
    EndReason,
    Engine,
    EngineDied,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    Lane,
    Sampling,
    StepBatch,
    Tell,
    TokenScores,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One way to be wrong; what is not given is right."""

    request: Callable[[EngineRequest], EngineRequest] = lambda request: request
    batch: Callable[[StepBatch, dict[Lane, EngineRequest]], StepBatch] = lambda batch, _: batch
    load: Callable[[EngineLoad], EngineLoad] = lambda load: load
    info: Callable[[EngineInfo], EngineInfo] = lambda info: info
    embedding: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]] = lambda found: found
    ignores_abort: bool = False
    ignores_stop: bool = False
    takes_any_adapter: bool = False


class FaultyEngine:
    """An Engine over another one, with a fault."""

    def __init__(self, engine: Engine, fault: Fault) -> None:
        self._engine = engine
        self._fault = fault
        self._requests: dict[Lane, EngineRequest] = {}

    async def start(self, tell: Tell | None = None) -> EngineInfo:
        return self._fault.info(await self._engine.start(tell))

    def submit(self, lane: Lane, request: EngineRequest) -> None:
        self._requests[lane] = request
        try:
            self._engine.submit(lane, self._fault.request(request))
        except EngineDied:
            if not self._fault.ignores_stop:
                raise

    def abort(self, lane: Lane) -> None:
        if not self._fault.ignores_abort:
            self._engine.abort(lane)

    async def next_step(self) -> StepBatch:
        return self._fault.batch(await self._engine.next_step(), self._requests)

    def load(self) -> EngineLoad:
        return self._fault.load(self._engine.load())

    async def load_adapter(self, adapter: Adapter) -> None:
        if not (self._fault.takes_any_adapter and not adapter.digest):
            await self._engine.load_adapter(adapter)

    async def embed(self, inputs: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        return self._fault.embedding(await self._engine.embed(inputs))

    async def stop(self) -> None:
        await self._engine.stop()


def sampled(**wrong: float | tuple[tuple[int, float], ...]) -> Fault:
    """Samples otherwise than it was asked to."""

    def change(request: EngineRequest) -> EngineRequest:
        return replace(request, sampling=replace(request.sampling, **wrong))  # type: ignore[arg-type]

    return Fault(request=change)


def with_seed(seed: Callable[[Sampling], int]) -> Fault:
    return Fault(
        request=lambda request: replace(
            request, sampling=replace(request.sampling, seed=seed(request.sampling))
        )
    )


def without_last_row(batch: StepBatch, _: dict[Lane, EngineRequest]) -> StepBatch:
    """Loses the token that comes with an end."""
    ends = {ended.lane for ended in batch.ended if ended.reason is EndReason.MAX_TOKENS}
    return _rows(batch, [row for row, lane in enumerate(batch.lanes) if lane not in ends])


def with_rows_twice(batch: StepBatch, _: dict[Lane, EngineRequest]) -> StepBatch:
    ends = {ended.lane for ended in batch.ended}
    rows = [row for row, lane in enumerate(batch.lanes) for _ in range(1 + (lane in ends))]
    return _rows(batch, rows)


def with_rows_exchanged(batch: StepBatch, _: dict[Lane, EngineRequest]) -> StepBatch:
    return replace(batch, token_ids=batch.token_ids[::-1])


def _rows(batch: StepBatch, rows: Sequence[int]) -> StepBatch:
    scores = batch.scores
    if scores is not None:
        scores = _scores(scores, rows)
    return replace(
        batch,
        lanes=[batch.lanes[row] for row in rows],
        token_ids=[batch.token_ids[row] for row in rows],
        scores=scores,
    )


def _scores(scores: TokenScores, rows: Sequence[int]) -> TokenScores:
    count = scores.top_count
    places = [row * count + at for row in rows for at in range(count)]
    return TokenScores(
        [scores.logprobs[row] for row in rows],
        count,
        [scores.top_token_ids[place] for place in places],
        [scores.top_logprobs[place] for place in places],
    )


def with_ends(change: Callable[[Ended], Sequence[Ended]]) -> Fault:
    def changed(batch: StepBatch, _: dict[Lane, EngineRequest]) -> StepBatch:
        return replace(batch, ended=[end for ended in batch.ended for end in change(ended)])

    return Fault(batch=changed)


def with_stop_token_shown(batch: StepBatch, _: dict[Lane, EngineRequest]) -> StepBatch:
    stopped = [ended for ended in batch.ended if ended.stop_token_id is not None]
    return replace(
        batch,
        lanes=[*batch.lanes, *(ended.lane for ended in stopped)],
        token_ids=[*batch.token_ids, *(ended.stop_token_id or 0 for ended in stopped)],
    )


def with_stop_text_cut(batch: StepBatch, requests: dict[Lane, EngineRequest]) -> StepBatch:
    """Ends where a stop text might have been, without its tokens."""
    lanes = {lane for lane in batch.lanes if requests[lane].stop_texts}
    made = _rows(batch, [row for row, lane in enumerate(batch.lanes) if lane not in lanes])
    ends = {ended.lane for ended in batch.ended}
    early = [Ended(lane, EndReason.END_OF_SEQUENCE) for lane in lanes - ends]
    return replace(made, ended=[*batch.ended, *early])


def with_prefills(times: int) -> Fault:
    def changed(batch: StepBatch, _: dict[Lane, EngineRequest]) -> StepBatch:
        return replace(batch, prefilled=batch.prefilled * times)

    return Fault(batch=changed)


def with_hits(cached_tokens: int) -> Fault:
    def changed(batch: StepBatch, _: dict[Lane, EngineRequest]) -> StepBatch:
        told = [replace(found, cached_tokens=cached_tokens) for found in batch.prefilled]
        return replace(batch, prefilled=told)

    return Fault(batch=changed)


def scored(change: Callable[[TokenScores], TokenScores]) -> Fault:
    def changed(batch: StepBatch, _: dict[Lane, EngineRequest]) -> StepBatch:
        scores = None if batch.scores is None else change(batch.scores)
        return replace(batch, scores=scores)

    return Fault(batch=changed)


def without_prompt_scores(batch: StepBatch, _: dict[Lane, EngineRequest]) -> StepBatch:
    return replace(batch, prompt_scores=batch.prompt_scores[:-1])


def loaded(**wrong: int | None) -> Fault:
    return Fault(load=lambda load: replace(load, **wrong))  # type: ignore[arg-type]


def asked(**wrong: object) -> Fault:
    return Fault(request=lambda request: replace(request, **wrong))  # type: ignore[arg-type]


FAULTS: dict[str, tuple[Fault, str]] = {
    "a token is lost with the end": (
        Fault(batch=without_last_row),
        "each_token_is_told_once_whatever_the_length",
    ),
    "a token comes twice": (
        Fault(batch=with_rows_twice),
        "each_token_is_told_once_whatever_the_length",
    ),
    "two lanes are exchanged": (
        Fault(batch=with_rows_exchanged),
        "company_does_not_change_the_output",
    ),
    "an end comes twice": (
        with_ends(lambda ended: [ended, ended]),
        "prompt_is_prefilled_then_tokens_come_then_one_end",
    ),
    "an end has no reason of its own": (
        with_ends(lambda ended: [replace(ended, reason=EndReason.END_OF_SEQUENCE)]),
        "full_context_ends_the_output",
    ),
    "a prompt is prefilled twice": (
        with_prefills(2),
        "prompt_is_prefilled_then_tokens_come_then_one_end",
    ),
    "a prompt is never prefilled": (
        with_prefills(0),
        "prompt_is_prefilled_then_tokens_come_then_one_end",
    ),
    "the context is shorter than it says": (
        Fault(info=lambda info: replace(info, context_length=info.context_length - 1)),
        "info_describes_what_was_asked_for",
    ),
    "the end of sequence is heeded": (
        asked(ignore_eos=False),
        "ignore_eos_goes_on_to_the_last_token",
    ),
    "a continuation begins anew": (
        asked(continue_ids=()),
        "a_continuation_equals_the_uninterrupted_run[greedy-9]",
    ),
    "a seed does nothing": (with_seed(lambda _: 1), "other_seeds_give_other_tokens"),
    "a seed has 32 bits": (with_seed(lambda drawn: drawn.seed % (1 << 32)), "seeds_have_64_bits"),
    "temperature does nothing": (sampled(temperature=0), "a_temperature_is_no_temperature_0"),
    "temperature 0 is chance": (
        sampled(temperature=1.0),
        "temperature_0_knows_no_seed",
    ),
    "stop tokens do nothing": (
        asked(stop_token_ids=frozenset()),
        "stop_token_ids_end_the_output_and_are_not_in_it",
    ),
    "a stop token is shown": (
        Fault(batch=with_stop_token_shown),
        "stop_token_ids_end_the_output_and_are_not_in_it",
    ),
    "a stop token is not named": (
        with_ends(lambda ended: [replace(ended, stop_token_id=None)]),
        "a_stop_token_ends_the_output_wherever_it_comes[ignored]",
    ),
    "a stop text is cut off": (
        Fault(batch=with_stop_text_cut),
        "an_engine_that_sees_a_stop_text_delivers_all_of_it",
    ),
    "a stop text cuts tokens": (
        Fault(batch=with_stop_text_cut),
        "a_stop_text_over_half_a_token_harms_nothing",
    ),
    "an abort does nothing": (
        Fault(ignores_abort=True),
        "abort_after_any_step_ends_once_and_frees_the_place[2]",
    ),
    "an abort is another end": (
        with_ends(lambda ended: [replace(ended, reason=EndReason.MAX_TOKENS)]),
        "all_may_be_aborted_at_once",
    ),
    "nothing ever runs": (loaded(running=0), "an_engine_that_works_never_looks_idle"),
    "nothing ever waits": (loaded(waiting=0), "load_counts_what_waits_and_runs"),
    "steps stand still": (loaded(steps=7), "steps_grow_while_the_engine_works"),
    "more is cached than there is": (
        loaded(kv_used_tokens=1 << 30),
        "load_says_how_full_the_cache_is",
    ),
    "the background is no background": (
        asked(is_background=False),
        "background_starts_when_nobody_else_waits",
    ),
    "bias does nothing": (sampled(logit_bias=()), "bias_forbids_and_forces"),
    "frequency does nothing": (
        sampled(frequency_penalty=0.0),
        "penalties_make_more_or_fewer_different_tokens[frequency]",
    ),
    "presence does nothing": (
        sampled(presence_penalty=0.0),
        "penalties_make_more_or_fewer_different_tokens[presence]",
    ),
    "repetition does nothing": (
        sampled(repetition_penalty=1.0),
        "repetition_penalty_keeps_off_what_was_there",
    ),
    "top_k does nothing": (
        sampled(top_k=0),
        "filters_that_leave_one_token_leave_the_likeliest",
    ),
    "top_p does nothing": (
        sampled(top_p=1.0),
        "filters_that_leave_one_token_leave_the_likeliest",
    ),
    "min_p does nothing": (sampled(min_p=0.0), "min_p_of_1_leaves_the_likeliest"),
    "the least output does nothing": (
        asked(min_output_tokens=0),
        "the_end_of_sequence_waits_for_the_least_tokens",
    ),
    "scores are not negative": (
        scored(lambda scores: replace(scores, logprobs=[-value for value in scores.logprobs])),
        "asking_for_log_probabilities_changes_no_token[greedy]",
    ),
    "alternatives are upside down": (
        scored(lambda scores: replace(scores, top_logprobs=scores.top_logprobs[::-1])),
        "log_probabilities_are_those_of_a_distribution",
    ),
    "scores are missing": (
        scored(lambda scores: replace(scores, logprobs=scores.logprobs[1:])),
        "asking_for_log_probabilities_changes_no_token[greedy]",
    ),
    "a part of the prompt has no scores": (
        Fault(batch=without_prompt_scores),
        "prompts_have_log_probabilities_from_the_second_token_on",
    ),
    "salts do nothing": (
        asked(cache_salt=b"everybody's"),
        "a_second_prompt_with_the_same_salt_hits_the_cache",
    ),
    "a cache is read that is not to be": (
        asked(reads_cache=True),
        "a_second_prompt_with_the_same_salt_hits_the_cache",
    ),
    "everything is said to be cached": (
        with_hits(64),
        "a_second_prompt_with_the_same_salt_hits_the_cache",
    ),
    "nothing is said to be cached": (with_hits(0), "a_longer_prompt_hits_what_it_shares"),
    "adapters do nothing": (
        asked(adapter=None),
        "adapters_change_the_output_and_the_base_stays_as_it_was",
    ),
    "anything is an adapter": (
        Fault(takes_any_adapter=True),
        "an_unusable_adapter_is_refused_and_harms_nobody",
    ),
    "vectors are too long": (
        Fault(embedding=lambda found: found * np.float32(2)),
        "embeddings_have_length_1_and_depend_on_the_input_alone",
    ),
    "constraints do nothing": (asked(constraint=None), "outputs_of_any_schema_are_valid"),
    "expressions do nothing": (
        asked(constraint=None),
        "a_regular_expression_matches_the_whole[(yes|no)]",
    ),
    "a stopped engine takes more": (Fault(ignores_stop=True), "stop_may_be_repeated_and_is_final"),
    "a stop text is cut off in the text": (
        Fault(batch=with_stop_text_cut),
        "a_stop_text_ends_an_output_wherever_it_stands",
    ),
}
"""What is wrong, and the check that has to notice it."""
