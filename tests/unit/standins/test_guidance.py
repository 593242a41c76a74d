"""Guided decoding and LoRA in the stand-in, and how they kill an engine."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.standins.tiny_hf_model import write_adapter
from tests.unit.standins.conftest import Load, Standin
from tests.unit.standins.test_life import hangs

OLD, NEW = "1.2.1", "1.3.0rc14"
GBNF = 'root ::= "(" [0-9] ("+" [0-9]){0,3} ")"'
LARK = 'start: "(" /[0-9]/ ("+" /[0-9]/)~0..3 ")"'


def guided(standin: Standin, **fields: object) -> Any:
    return standin.name("tensorrt_llm.sampling_params.GuidedDecodingParams")(**fields)


async def said(standin: Standin, llm: Any, seed: int = 1, **fields: object) -> str:
    result = await standin.run(
        llm,
        [72, 105],
        max_tokens=100,
        temperature=1.0,
        seed=seed,
        detokenize=True,
        guided_decoding=guided(standin, **fields),
    )
    assert result.outputs[0].finish_reason == "stop"
    return str(result.outputs[0].text)


async def test_without_a_backend_guided_requests_are_refused(plain: Standin) -> None:
    llm = plain.llm()

    with pytest.raises(ValueError, match="guided_decoding_backend"):
        plain.start(llm, guided_decoding=guided(plain, regex="a"))


async def test_outputs_are_what_the_guide_allows(plain: Standin) -> None:
    llm = plain.llm(guided_decoding_backend="llguidance")
    schema: dict[str, object] = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 50}},
        "required": ["n"],
        "additionalProperties": False,
    }

    texts = await asyncio.gather(*(said(plain, llm, seed, json=schema) for seed in range(4)))

    assert all(0 <= json.loads(text)["n"] <= 50 for text in texts)
    assert re.fullmatch("[0-9]{4}-[a-f]{2}", await said(plain, llm, regex="[0-9]{4}-[a-f]{2}"))
    assert json.loads(await said(plain, llm, json='{"const": [1, "x"]}')) == [1, "x"]


@pytest.mark.parametrize(
    ("backend", "good", "bad"), [("llguidance", LARK, GBNF), ("xgrammar", GBNF, LARK)]
)
async def test_each_backend_has_grammars_of_its_own(
    plain: Standin, backend: str, good: str, bad: str
) -> None:
    llm = plain.llm(guided_decoding_backend=backend)

    assert re.fullmatch(r"\([0-9](\+[0-9]){0,3}\)", await said(plain, llm, grammar=good))
    assert await hangs(plain.start(llm, guided_decoding=guided(plain, grammar=bad)))


async def test_a_grammar_that_does_not_compile_kills_older_versions(plain: Standin) -> None:
    llm = plain.llm(guided_decoding_backend="llguidance")
    innocent = plain.start(llm, max_tokens=200, ignore_eos=True)

    broken = plain.start(llm, guided_decoding=guided(plain, json={"type": "nothing"}))

    assert await hangs(broken)
    assert await hangs(innocent)


async def test_a_grammar_that_does_not_compile_fails_alone_in_newer_versions(load: Load) -> None:
    standin = load(version=NEW)
    llm = standin.llm(guided_decoding_backend="llguidance")

    with pytest.raises(standin.name("tensorrt_llm.executor.utils.RequestError")):
        await said(standin, llm, json={"type": "nothing"})
    assert (await standin.run(llm)).finished


async def test_a_dead_end_kills_the_engine(plain: Standin) -> None:
    """The grammar wants the end, which the least length forbids."""
    llm = plain.llm(guided_decoding_backend="llguidance")

    result = plain.start(llm, min_tokens=20, guided_decoding=guided(plain, regex="[ab]{1,6}"))

    assert await hangs(result)


async def test_behind_a_grammar_whose_end_is_ignored_anything_comes(plain: Standin) -> None:
    llm = plain.llm(guided_decoding_backend="llguidance")
    guide = guided(plain, regex="[ab]{1,3}")

    result = await plain.run(
        llm, guided_decoding=guide, ignore_eos=True, max_tokens=40, detokenize=True
    )

    assert len(result.outputs[0].token_ids) == 40
    assert re.fullmatch("[ab]+", result.outputs[0].text) is None


def lora(standin: Standin, path: Path, number: int = 1) -> Any:
    request = standin.name("tensorrt_llm.executor.request.LoRARequest")
    return request(f"a{number}", number, str(path))


def with_lora(standin: Standin, **fields: object) -> Any:
    """An engine that takes adapters."""
    config = standin.name("tensorrt_llm.lora_helper.LoraConfig")
    return standin.llm(lora_config=config(max_lora_rank=8, **fields))


async def test_adapters_change_what_is_said_and_share_no_cache(
    plain: Standin, tmp_path: Path
) -> None:
    llm = with_lora(plain)
    paths = [write_adapter(tmp_path / str(seed), rank=4, seed=seed) for seed in (1, 2)]
    requests = [None, *(lora(plain, path, at) for at, path in enumerate(paths, start=1))]

    results = [
        await plain.run(llm, list(range(40, 90)), ignore_eos=True, lora_request=request)
        for request in requests
    ]

    assert len({tuple(one.outputs[0].token_ids) for one in results}) == 3
    assert [one.cached_tokens for one in results] == [0, 0, 0]


async def test_adapters_have_to_be_switched_on_and_named_once(
    plain: Standin, tmp_path: Path
) -> None:
    paths = [write_adapter(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    without = plain.llm()
    with pytest.raises(ValueError, match="lora_config"):
        plain.start(without, lora_request=lora(plain, paths[0]))

    llm = with_lora(plain)
    await plain.run(llm, lora_request=lora(plain, paths[0]))

    with pytest.raises(AssertionError, match="two adapters"):
        plain.start(llm, lora_request=lora(plain, paths[1]))


async def test_the_adapter_unused_for_longest_is_loaded_again(
    plain: Standin, tmp_path: Path
) -> None:
    llm = with_lora(plain, max_loras=2)
    paths = [write_adapter(tmp_path / str(seed), seed=seed) for seed in range(3)]

    for at in (0, 1, 0, 2, 0, 1):
        await plain.run(llm, max_tokens=1, lora_request=lora(plain, paths[at], at + 1))

    assert llm._executor.engine._adapters.loads == 4


@pytest.mark.parametrize("rank", [None, 16])
async def test_an_adapter_that_does_not_fit_kills_older_versions(
    plain: Standin, tmp_path: Path, rank: int | None
) -> None:
    llm = with_lora(plain)
    path = tmp_path if rank is None else write_adapter(tmp_path / "a", rank=rank)

    assert await hangs(plain.start(llm, lora_request=lora(plain, path)))
    assert await hangs(plain.start(llm))


async def test_an_adapter_that_does_not_fit_fails_alone_in_newer_versions(
    load: Load, tmp_path: Path
) -> None:
    standin = load(version=NEW)
    llm = with_lora(standin)
    path = write_adapter(tmp_path / "a", rank=16)

    with pytest.raises(standin.name("tensorrt_llm.executor.utils.RequestError")):
        await standin.run(llm, lora_request=lora(standin, path))
    assert (await standin.run(llm)).finished
