"""How the stand-in generates: outputs that grow, stops that cut, what engines do not do for you."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from tests.unit.standins.conftest import PATIENCE_S, PROMPT, Load, Standin

NEW, NEWEST = "1.3.0rc14", "1.4.0rc1"


async def test_one_object_grows_and_is_yielded_each_time(plain: Standin) -> None:
    result = plain.start(plain.llm(), max_tokens=5, ignore_eos=True)

    seen: list[Any] = []
    lengths = []
    async for item in result:
        seen.append(item)
        lengths.append(len(item.outputs[0].token_ids))

    assert lengths == [1, 2, 3, 4, 5]
    assert all(item is result for item in seen)
    assert (result.outputs[0].finish_reason, result.finished) == ("length", True)
    assert result.request_id == 2


async def test_without_streaming_one_item_comes(plain: Standin) -> None:
    result = plain.start(plain.llm(), max_tokens=5, ignore_eos=True, streaming=False)

    assert [len(item.outputs[0].token_ids) async for item in result] == [5]


async def test_a_stream_interval_tells_every_so_many_steps(plain: Standin) -> None:
    result = plain.start(plain.llm(stream_interval=4), max_tokens=10, ignore_eos=True)

    assert [len(item.outputs[0].token_ids) async for item in result] == [1, 4, 8, 10]


async def test_who_has_priority_starts_first(load: Load) -> None:
    standin = load(version="1.3.0rc14")
    llm = standin.llm(max_batch_size=1)
    begun: list[str] = []

    async def run(name: str, priority: float) -> None:
        async for _ in standin.start(llm, priority=priority):
            if name not in begun:
                begun.append(name)

    await asyncio.gather(run("first", 0.5), run("low", 0.1), run("high", 0.9), run("middle", 0.5))

    assert begun.index("high") < begun.index("middle") < begun.index("low")


async def test_greedy_outputs_go_on_from_anywhere(plain: Standin) -> None:
    llm = plain.llm()
    whole = (await plain.run(llm, max_tokens=24, ignore_eos=True)).outputs[0].token_ids

    rest = await plain.run(llm, PROMPT + whole[:9], max_tokens=15, ignore_eos=True)
    other = await plain.run(llm, [*PROMPT, 33, 33], max_tokens=24, ignore_eos=True)

    assert rest.outputs[0].token_ids == whole[9:]
    assert other.outputs[0].token_ids != whole


async def test_without_temperature_it_is_greedy_and_without_seed_the_seed_is_0(
    plain: Standin,
) -> None:
    llm = plain.llm()

    async def said(**fields: object) -> list[int]:
        result = await plain.run(llm, PROMPT, max_tokens=20, ignore_eos=True, **fields)
        return list(result.outputs[0].token_ids)

    assert await said() == await said(temperature=0.0) == await said(seed=5)
    assert await said(temperature=1.0) == await said(temperature=1.0, seed=0)
    assert await said(temperature=1.0) != await said(temperature=1.0, seed=1)


async def test_a_continuation_draws_anew_unless_draws_go_by_place(load: Load) -> None:
    warm: dict[str, object] = {"temperature": 1.0, "seed": 3, "ignore_eos": True}
    for draws in ("request", "position"):
        standin = load(draws=draws)
        llm = standin.llm()
        whole = (await standin.run(llm, PROMPT, max_tokens=12, **warm)).outputs[0].token_ids

        rest = await standin.run(llm, PROMPT + whole[:5], max_tokens=7, **warm)

        assert (rest.outputs[0].token_ids == whole[5:]) is (draws == "position")


async def test_a_draw_is_the_same_whatever_else_may_come(plain: Standin) -> None:
    """So a filter that keeps everything changes nothing, and neither does company."""
    llm = plain.llm()
    warm: dict[str, object] = {"temperature": 0.8, "seed": 3, "ignore_eos": True, "max_tokens": 30}

    alone = await plain.run(llm, PROMPT, **warm)
    filtered, other = await asyncio.gather(
        plain.run(llm, PROMPT, top_k=570, **warm), plain.run(llm, PROMPT, **{**warm, "seed": 4})
    )

    assert filtered.outputs[0].token_ids == alone.outputs[0].token_ids
    assert other.outputs[0].token_ids != alone.outputs[0].token_ids


async def test_max_tokens_is_32_unless_it_is_said(plain: Standin) -> None:
    llm = plain.llm()
    params = plain.module.SamplingParams(ignore_eos=True)

    result = await llm.generate_async(PROMPT, sampling_params=params)

    assert len(result.outputs[0].token_ids) == 32


async def test_the_end_is_among_the_tokens_and_only_the_first_one_is_known(plain: Standin) -> None:
    """Of 40 outputs some end by the other end of generation_config.json, or would have."""
    llm = plain.llm()
    end, other = plain.model.eos_ids

    results = await asyncio.gather(
        *(plain.run(llm, temperature=1.0, seed=seed, max_tokens=200) for seed in range(40))
    )

    ended = [one.outputs[0] for one in results if one.outputs[0].finish_reason == "stop"]
    assert len(ended) > 30
    assert all(output.token_ids[-1] == end for output in ended)
    assert all(output.stop_reason is None for output in ended)
    assert any(other in output.token_ids for output in ended)


async def test_newer_versions_know_all_ends(load: Load) -> None:
    standin = load(version="1.3.0rc14")
    llm = standin.llm()

    results = await asyncio.gather(
        *(standin.run(llm, temperature=1.0, seed=seed, max_tokens=200) for seed in range(20))
    )

    other = standin.model.eos_ids[1]
    assert not any(other in one.outputs[0].token_ids[:-1] for one in results)


async def test_a_stop_word_is_cut_after_its_beginning_was_streamed(plain: Standin) -> None:
    llm = plain.llm()
    prompt, whole, at = await two_tokens_of_one_text(plain, llm)
    text = llm.tokenizer.decode(whole[at : at + 2], skip_special_tokens=False)

    result = plain.start(llm, prompt, max_tokens=12, stop=[text])
    lengths = [len(item.outputs[0].token_ids) async for item in result]

    assert lengths == [*range(1, at + 2), at]
    assert result.outputs[0].stop_reason == text
    kept = await plain.run(llm, prompt, stop=[text], include_stop_str_in_output=True, max_tokens=12)
    assert kept.outputs[0].token_ids == whole[: at + 2]


async def two_tokens_of_one_text(standin: Standin, llm: Any) -> tuple[list[int], list[int], int]:
    """A prompt, its output, and a place in it where the text of two tokens makes them again."""
    for first in range(40, 120):
        prompt = [first, 33]
        whole = list((await standin.run(llm, prompt, max_tokens=12)).outputs[0].token_ids)
        for at in range(2, len(whole) - 1):
            text = llm.tokenizer.decode(whole[at : at + 2], skip_special_tokens=True)
            again = llm.tokenizer.encode(text, add_special_tokens=False)
            if again == whole[at : at + 2] and whole.index(again[0]) == at:
                return prompt, whole, at
    raise AssertionError("no prompt gives such an output")


async def test_stop_texts_need_the_engines_own_end(plain: Standin) -> None:
    llm = plain.llm()

    with pytest.raises(RuntimeError, match="setup method"):
        plain.start(llm, end_id=plain.model.eos_id, stop=["x"])


async def test_without_a_tokenizer_every_request_needs_an_end(plain: Standin) -> None:
    llm = plain.llm(skip_tokenizer_init=True)

    with pytest.raises(ValueError, match="tokenizer is required"):
        plain.start(llm)
    assert (await plain.run(llm, end_id=plain.model.eos_id)).finished


async def test_ignoring_the_end_switches_all_stops_off(plain: Standin) -> None:
    llm = plain.llm()
    whole = (await plain.run(llm, max_tokens=20, ignore_eos=True)).outputs[0].token_ids

    deaf = await plain.run(llm, max_tokens=20, ignore_eos=True, stop_token_ids=[whole[1]])

    assert deaf.outputs[0].token_ids == whole


async def test_the_last_token_that_fits_is_never_a_stop(plain: Standin) -> None:
    """It ends by its length first, and keeps the stop id."""
    llm = plain.llm()
    whole = (await plain.run(llm, max_tokens=2, ignore_eos=True)).outputs[0].token_ids

    result = await plain.run(llm, max_tokens=2, stop_token_ids=[whole[1]])

    assert result.outputs[0].token_ids == whole
    assert result.outputs[0].finish_reason == "length"


async def test_the_least_length_knows_the_engines_own_end_only(load: Load) -> None:
    standin = load(version=NEW, features={"generation_config_eos": False})
    llm = standin.llm()

    results = await asyncio.gather(
        *(
            standin.run(llm, temperature=1.0, seed=seed, max_tokens=100, min_tokens=100)
            for seed in range(12)
        )
    )

    outputs = [one.outputs[0].token_ids for one in results]
    assert all(standin.model.eos_id not in output[:100] for output in outputs)
    assert any(standin.model.eos_ids[1] in output[:100] for output in outputs)


async def test_the_least_length_is_that_of_prompt_and_output_in_older_versions(
    plain: Standin,
) -> None:
    llm = plain.llm()
    short = await plain.run(llm, max_tokens=60)
    length = len(short.outputs[0].token_ids)
    assert short.outputs[0].finish_reason == "stop"

    same = await plain.run(llm, max_tokens=60, min_tokens=len(PROMPT) + length - 1)
    longer = await plain.run(llm, max_tokens=60, min_tokens=len(PROMPT) + length)

    assert same.outputs[0].token_ids == short.outputs[0].token_ids
    assert len(longer.outputs[0].token_ids) > length


async def test_filters_penalties_and_bias_do_what_they_say(load: Load) -> None:
    standin = load(version=NEWEST)
    llm = standin.llm()
    torch: Any = pytest.importorskip("torch")

    async def said(**fields: object) -> list[int]:
        fields = {"max_tokens": 60, "ignore_eos": True, **fields}
        return list((await standin.run(llm, PROMPT, **fields)).outputs[0].token_ids)

    greedy = await said()
    forced = torch.zeros(standin.model.vocabulary_rows, dtype=torch.float32)
    forced[99] = 100.0
    warm = {"temperature": 1.0, "seed": 3}

    assert await said(**warm, top_k=1) == await said(**warm, top_p=1e-6) == greedy
    assert await said(**warm, min_p=1.0) == greedy
    assert await said(**warm, embedding_bias=forced) == [99] * 60
    free, fond = len(set(await said(**warm))), len(set(await said(**warm, frequency_penalty=-2.0)))
    averse = len(set(await said(**warm, repetition_penalty=5.0)))
    assert fond < free < averse
    assert 99 not in await said(bad_token_ids=[99], **warm)


async def test_older_versions_take_penalties_and_leave_them_out(plain: Standin) -> None:
    llm = plain.llm()
    warm: dict[str, object] = {"temperature": 1.0, "seed": 3, "ignore_eos": True}

    free = await plain.run(llm, PROMPT, **warm)
    penalized = await plain.run(
        llm, PROMPT, repetition_penalty=5.0, frequency_penalty=2.0, min_p=1.0, **warm
    )

    assert penalized.outputs[0].token_ids == free.outputs[0].token_ids


async def test_penalties_count_the_prompt_unless_they_are_told_its_length(load: Load) -> None:
    standin = load(version=NEWEST)
    llm = standin.llm()
    first = (await standin.run(llm, max_tokens=1)).outputs[0].token_ids[0]
    prompt = [first, *PROMPT]

    async def said(**fields: object) -> int:
        result = await standin.run(llm, prompt, max_tokens=1, presence_penalty=2.0, **fields)
        return int(result.outputs[0].token_ids[0])

    free = (await standin.run(llm, prompt, max_tokens=1)).outputs[0].token_ids[0]
    biased = [await said(), await said(prompt_ignore_length=len(prompt))]

    assert free == first == biased[1]
    assert biased[0] != first


@pytest.mark.parametrize("is_allowed", [False, True])
async def test_guesses_of_the_model_itself_are_drawn_in_its_graph(
    load: Load, *, is_allowed: bool
) -> None:
    """There, nothing but the likeliest token is drawn unless that is asked for; nor scored."""
    standin = load(version=NEW)
    config = {"decoding_type": "MTP", "allow_advanced_sampling": is_allowed}
    llm = standin.llm(speculative_config=config)
    greedy = await standin.run(llm, max_tokens=20, ignore_eos=True)

    warm = await standin.run(llm, max_tokens=20, ignore_eos=True, temperature=1.0, logprobs=1)

    assert (warm.outputs[0].token_ids != greedy.outputs[0].token_ids) is is_allowed
    assert warm.outputs[0].logprobs == []


async def test_a_stop_word_may_begin_in_the_prompt(plain: Standin) -> None:
    """Then it ends the output, and nothing is cut, and nobody says by what."""
    llm = plain.llm()
    encode, decode = llm.tokenizer.encode, llm.tokenizer.decode

    async def drawn(first: int) -> int:
        result = await plain.run(llm, [*PROMPT, first], max_tokens=2, ignore_eos=True)
        return int(result.outputs[0].token_ids[0])

    pairs = [(first, await drawn(first)) for first in range(97, 123)]
    first, second = next(
        pair for pair in pairs if encode(decode([*pair]), add_special_tokens=False) == [*pair]
    )
    result = await plain.run(llm, [*PROMPT, first], stop=[decode([first, second])])

    assert result.outputs[0].token_ids == [second]
    assert (result.outputs[0].finish_reason, result.outputs[0].stop_reason) == ("stop", None)


async def test_log_probabilities_come_as_dicts_and_0_asks_for_none(plain: Standin) -> None:
    llm = plain.llm()

    scored = (await plain.run(llm, logprobs=2, prompt_logprobs=1, max_tokens=4)).outputs[0]
    unscored = (await plain.run(llm, logprobs=0, max_tokens=4)).outputs[0]

    assert len(scored.logprobs) == len(scored.token_ids)
    for token_id, scores in zip(scored.token_ids, scored.logprobs, strict=True):
        assert scores[token_id].rank == 1
        assert len(scores) == 2
    assert len(scored.prompt_logprobs) == len(PROMPT)
    assert unscored.logprobs == []


async def test_prompts_have_no_log_probabilities_where_the_cache_had_them(plain: Standin) -> None:
    llm = plain.llm()
    await plain.run(llm, list(range(64)), max_tokens=1)

    result = await plain.run(llm, list(range(64)), max_tokens=1, prompt_logprobs=1)

    assert len(result.outputs[0].prompt_logprobs) == 64 - result.cached_tokens < 64


@pytest.mark.parametrize("fault", ["logprobs_flat", "logprobs_longer", "logprobs_missing"])
async def test_log_probabilities_may_be_odd(load: Load, fault: str) -> None:
    standin = load(faults=[{"name": fault, "every": True}])
    result = standin.start(standin.llm(), logprobs=1, max_tokens=4, ignore_eos=True)

    kinds, extra = set(), []
    async for item in result:
        output = item.outputs[0]
        kinds |= {type(score).__name__ for score in output.logprobs}
        extra.append(len(output.logprobs) - len(output.token_ids))

    assert (kinds, extra) == {
        "logprobs_flat": ({"float"}, [0, 0, 0, 0]),
        "logprobs_longer": ({"dict"}, [1, 1, 1, 0]),
        "logprobs_missing": (set(), [-1, -2, -3, -4]),
    }[fault]


async def test_sampling_parameters_are_changed_and_good_for_one_request(plain: Standin) -> None:
    llm = plain.llm()
    params = plain.params()

    await llm.generate_async(PROMPT, sampling_params=params)

    assert params.end_id == plain.model.eos_id
    with pytest.raises(AssertionError, match="per request"):
        llm.generate_async(PROMPT, sampling_params=params)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [([], IndexError), (["a"], AssertionError), ((1, 2), TypeError), ([True], AssertionError)],
)
async def test_prompts_are_lists_of_ints(
    plain: Standin, prompt: Any, error: type[Exception]
) -> None:
    llm = plain.llm()

    with pytest.raises(error):
        plain.start(llm, prompt)


@pytest.mark.parametrize("arguments", [{"trace_headers": {}}, {"priority": 0.5}, {"cache_salt": 7}])
async def test_arguments_that_a_version_lacks_are_refused(
    plain: Standin, arguments: dict[str, object]
) -> None:
    llm = plain.llm()

    with pytest.raises(TypeError):
        llm.generate_async(PROMPT, sampling_params=plain.params(), **arguments)
    with pytest.raises(TypeError, match="by name"):
        llm.generate_async(PROMPT, plain.params())


@pytest.mark.parametrize(
    ("version", "error"), [("1.2.1", "ValueError"), ("1.4.0rc1", "RequestError")]
)
async def test_prompts_longer_than_a_step_are_refused(load: Load, version: str, error: str) -> None:
    standin = load(version=version)
    chunked = standin.llm(max_num_tokens=16, enable_chunked_prefill=True)

    with pytest.raises((ValueError, RuntimeError)) as caught:
        standin.start(standin.llm(max_num_tokens=16), [1] * 17)
    assert type(caught.value).__name__ == error
    assert (await standin.run(chunked, [1] * 100)).finished


@pytest.mark.parametrize("fields", [{"max_tokens": 0}, {"prompt": [1] * 256}])
async def test_what_leaves_no_room_fails_while_it_is_read(
    plain: Standin, fields: dict[str, Any]
) -> None:
    error = plain.name("tensorrt_llm.executor.utils.RequestError")
    result = plain.start(plain.llm(), **fields)

    with pytest.raises(error):
        await anext(result)
    assert not result.finished
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(result), 0.02)


async def test_no_more_run_than_fit_and_the_rest_wait(plain: Standin) -> None:
    """KV is set aside for all of max_tokens: of four requests of half the cache, two run."""
    llm = plain.llm(
        max_batch_size=3, enable_iter_perf_stats=True, kv_cache_config={"max_tokens": 256}
    )

    await asyncio.gather(
        *(plain.run(llm, max_tokens=120, ignore_eos=True, seed=seed) for seed in range(4))
    )

    stats = [entry async for entry in llm.get_stats_async(timeout=0.01)]
    assert max(entry["numActiveRequests"] for entry in stats) == 2
    assert max(entry["numQueuedRequests"] for entry in stats) == 2


async def test_requests_of_another_thread_or_loop_are_refused(plain: Standin) -> None:
    llm = plain.llm()
    await plain.run(llm)
    caught: list[BaseException] = []

    async def elsewhere() -> None:
        plain.start(llm)

    def run() -> None:
        try:
            asyncio.run(elsewhere())
        except AssertionError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    await asyncio.to_thread(thread.join, PATIENCE_S)

    assert "one event loop" in str(caught[0])


def test_outside_of_a_loop_nothing_can_be_awaited(plain: Standin) -> None:
    result = plain.start(plain.llm())

    async def read() -> None:
        await result

    with pytest.raises(AssertionError, match="event loop"):
        asyncio.run(read())
    assert result.result(timeout=0.0).finished


async def test_several_sequences_are_told_badly(plain: Standin) -> None:
    """Only the one that ends last learns why it ended."""
    result = await plain.run(plain.llm(), n=2, temperature=1.0, ignore_eos=True, max_tokens=4)

    assert [len(output.token_ids) for output in result.outputs] == [4, 4]
    assert sorted(str(output.finish_reason) for output in result.outputs) == ["None", "length"]


async def test_guesses_ahead_give_several_tokens_in_one_step(plain: Standin) -> None:
    config = {"decoding_type": "NGram", "max_draft_len": 3}
    llm = plain.llm(speculative_config=config)
    whole = (await plain.run(plain.llm(), max_tokens=20, ignore_eos=True)).outputs[0].token_ids

    result = plain.start(llm, max_tokens=20, ignore_eos=True)
    steps = [len(item.outputs[0].token_ids_diff) async for item in result]

    assert result.outputs[0].token_ids == whole
    assert max(steps) > 1
    assert sum(steps) == 20
