"""The trtllm engine over the stand-in: how it starts, refuses to start, fails and dies."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from services.worker.engine.base import (
    Constraint,
    ConstraintKind,
    Ended,
    EndReason,
    EngineDied,
    EngineInfo,
    EngineRequest,
    EngineStartError,
    Lane,
    LoadProgress,
    LoadStage,
    Sampling,
)
from services.worker.engine.hf_digest import digest_of
from services.worker.engine.trtllm import TrtllmEngine
from services.worker.engine.wire_facts import Setting
from services.worker.trtllm_config import TrtllmSection
from tests.standins.tiny_hf_model import TinyModel, write_model

STANDINS = Path(__file__).parents[4] / "standins"
PATIENCE_S = 20.0
WARM_UP = 1
"""Calls of generate_async before the first execution."""
GREEDY = Sampling(temperature=0, top_p=1, top_k=0, seed=0)
PLAIN = EngineRequest(
    prompt_ids=(72, 101, 108, 108, 111), max_output_tokens=12, ignore_eos=True, sampling=GREEDY
)
FATAL = {"name": "fatal", "message": "CUDA error"}
Fault = Mapping[str, object]
MakeEngine = Callable[..., TrtllmEngine]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> MakeEngine:
    def make_engine(
        *faults: Fault,
        digest: str | None = None,
        folder: Path = model.folder,
        section: Mapping[str, object] | None = None,
        **stand_in: object,
    ) -> TrtllmEngine:
        monkeypatch.setenv("PYTHONPATH", str(STANDINS))
        monkeypatch.setenv("MAAS_STANDIN_TRTLLM", json.dumps({"faults": faults, **stand_in}))
        quick = {"statistics": {"poll_interval": "10ms"}, "kv_cache": {"max_tokens": 2048}}
        told = TrtllmSection.model_validate({**quick, **(section or {})})
        settings: dict[str, Setting] = {
            "model_path": str(folder),
            "capacity": 4,
            "context_length": 128,
            "expected_digest": digest,
            "trtllm": told.model_dump(mode="json"),
        }
        return TrtllmEngine(settings, start_timeout_s=PATIENCE_S)

    return make_engine


@dataclass
class Told:
    """What was told of one execution."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: Ended | None = None


@dataclass
class World:
    """A started engine."""

    engine: TrtllmEngine
    info: EngineInfo
    told: dict[Lane, Told] = field(default_factory=dict)

    def submit(self, lane: Lane, request: EngineRequest) -> None:
        self.told[lane] = Told()
        self.engine.submit(lane, request)

    async def step(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            batch = await self.engine.next_step()
        for row, (lane, token_id) in enumerate(zip(batch.lanes, batch.token_ids, strict=True)):
            self.told[lane].token_ids.append(token_id)
            if batch.scores is not None:
                self.told[lane].logprobs.append(batch.scores.logprobs[row])
        for ended in batch.ended:
            self.told[ended.lane].ended = ended

    async def run(self, lane: Lane, request: EngineRequest) -> tuple[list[int], Ended]:
        self.submit(lane, request)
        while (ended := self.told[lane].ended) is None:
            await self.step()
        return self.told[lane].token_ids, ended


@asynccontextmanager
async def started(engine: TrtllmEngine) -> AsyncIterator[World]:
    try:
        yield World(engine, await engine.start())
    finally:
        async with asyncio.timeout(PATIENCE_S):
            await engine.stop()


async def until_dead(engine: TrtllmEngine) -> str:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await engine.next_step()
            except EngineDied as error:
                return str(error)


async def test_a_start_is_told_stage_by_stage_and_says_what_was_started(
    make: MakeEngine, model: TinyModel
) -> None:
    digest = digest_of(model.folder, lambda _: None)
    engine, told = make(digest=digest), list[LoadProgress]()

    info = await engine.start(told.append)
    await engine.stop()

    stages = [progress.stage for progress in told]
    assert stages == sorted(stages, key=list(LoadStage).index)
    assert set(stages) == set(LoadStage)
    assert info.engine == "trtllm"
    assert info.version == "tensorrt_llm 1.2.1"
    assert info.digest == digest
    assert (info.max_running, info.context_length) == (4, 128)
    assert info.vocabulary_size == model.vocabulary_rows


async def refusal(engine: TrtllmEngine) -> str:
    with pytest.raises(EngineStartError) as refused:
        await engine.start()
    return str(refused.value)


async def test_another_model_than_expected_is_refused_before_the_engine_sees_it(
    make: MakeEngine, model: TinyModel
) -> None:
    """The engine would not come back, had it been asked."""
    wanted = f"sha256:{'0' * 64}"

    message = await refusal(make({"name": "load_hang"}, digest=wanted))

    assert wanted in message
    assert digest_of(model.folder, lambda _: None) in message


async def test_what_is_no_model_is_refused(make: MakeEngine, tmp_path: Path) -> None:
    assert "config.json" in await refusal(make(folder=tmp_path))


async def test_an_engine_that_cannot_load_says_why(make: MakeEngine) -> None:
    message = await refusal(make({"name": "load_error", "message": "no memory for the weights"}))

    assert "no memory for the weights" in message


async def test_an_engine_that_dies_while_it_loads_is_a_failed_start(make: MakeEngine) -> None:
    assert "SIGKILL" in await refusal(make({"name": "load_killed"}))


async def test_an_engine_that_cannot_draw_is_a_failed_start(make: MakeEngine) -> None:
    message = await refusal(make({"name": "request_error", "request": WARM_UP}))

    assert "first token" in message


async def test_other_files_than_the_workers_are_refused(make: MakeEngine) -> None:
    engine = make()
    engine._settings["trtllm"] = {}

    assert "restart it" in await refusal(engine)


def of(request: int, name: str, **parameters: object) -> Fault:
    """A fault of the n-th execution."""
    return {"name": name, "request": WARM_UP + request, **parameters}


async def test_faults_of_one_request_are_its_own(make: MakeEngine) -> None:
    """One engine, one execution after the other, each with something else the matter."""
    faults = [
        of(2, "request_error", tokens=3),
        of(3, "call_error", type="RequestError"),
        of(4, "finish_reason", reason="timeout"),
        of(5, "finish_reason"),
        of(6, "logprobs_flat"),
        of(7, "logprobs_longer"),
        of(8, "logprobs_missing"),
        of(9, "abort_ignored"),
    ]
    scored = replace(PLAIN, top_logprobs=0)
    async with started(make(*faults)) as world:
        whole, ended = await world.run(1, PLAIN)
        broken = await world.run(2, PLAIN)
        refused = await world.run(3, PLAIN)
        timed_out = await world.run(4, PLAIN)
        unexplained = await world.run(5, PLAIN)
        for lane in (6, 7, 8):
            await world.run(lane, scored)
        world.submit(9, replace(PLAIN, max_output_tokens=100))
        await world.step()
        world.engine.abort(9)
        while (ignored := world.told[9].ended) is None:
            await world.step()

    assert ended == Ended(1, EndReason.MAX_TOKENS)
    assert 0 < len(broken[0]) < len(whole)
    assert (broken[0], broken[1].reason) == (whole[: len(broken[0])], EndReason.FAILED)
    assert refused[0] == []
    assert "RequestError" in refused[1].message
    assert timed_out[1].reason is EndReason.FAILED
    assert unexplained == (whole, Ended(5, EndReason.MAX_TOKENS))
    assert [world.told[lane].token_ids for lane in (6, 7, 8)] == [whole] * 3
    assert world.told[6].logprobs == pytest.approx(world.told[7].logprobs)
    assert all(value <= 0 for value in world.told[6].logprobs)
    assert all(math.isnan(value) for value in world.told[8].logprobs)
    assert ignored == Ended(9, EndReason.ABORTED)


async def test_what_is_fatal_to_one_is_the_end_of_all_and_said(
    make: MakeEngine, tmp_path: Path
) -> None:
    """TensorRT-LLM shuts itself down in the coroutine that hears of it, and that may hang."""
    fatal = {**FATAL, "blocks_s": None, "when_file": str(tmp_path / "now")}
    async with started(make(fatal, step_s=0.01)) as world:
        for lane in (1, 2):
            world.submit(lane, replace(PLAIN, max_output_tokens=100))
        await world.step()
        (tmp_path / "now").touch()

        death = await until_dead(world.engine)

    assert "TensorRT-LLM has shut itself down" in death


async def test_a_fatal_error_that_does_not_hang_is_told_in_its_own_words(
    make: MakeEngine, tmp_path: Path
) -> None:
    fatal = {**FATAL, "blocks_s": 0, "when_file": str(tmp_path / "now")}
    async with started(make(fatal, step_s=0.01)) as world:
        world.submit(1, replace(PLAIN, max_output_tokens=100))
        await world.step()
        (tmp_path / "now").touch()

        death = await until_dead(world.engine)

    assert "RuntimeError: CUDA error" in death


async def test_a_cache_that_is_not_told_is_not_known(make: MakeEngine) -> None:
    async with started(make({"name": "stats_null_kv"}, step_s=0.005)) as world:
        world.submit(1, replace(PLAIN, max_output_tokens=60))
        await world.step()
        load = world.engine.load()

    assert (load.running, load.waiting) == (1, 0)
    assert load.kv_used_tokens is None
    assert load.kv_total_tokens is None


@pytest.mark.parametrize("version", ["1.2.1", "1.3.0rc14"])
async def test_steps_go_on_while_an_execution_says_nothing(make: MakeEngine, version: str) -> None:
    """Iterations are a sign of life, not only tokens, which come after 60 of them here."""
    rare = {"batching": {"stream_interval": 60, "stream_interval_under_load": 60}}
    async with started(make(section=rare, step_s=0.01, version=version)) as world:
        world.submit(1, replace(PLAIN, max_output_tokens=100))
        await world.step()
        before = world.engine.load().steps
        assert before is not None
        async with asyncio.timeout(PATIENCE_S):
            while (world.engine.load().steps or 0) < before + 3:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.002)
        told = len(world.engine._batch.lanes)

    assert told == 0


async def test_a_constraint_that_does_not_compile_leaves_the_engine_alive(
    make: MakeEngine,
) -> None:
    """TensorRT-LLM 1.2 does not survive it."""
    broken = Constraint(kind=ConstraintKind.GRAMMAR, source="", grammar="start: nothing\n")
    async with started(make()) as world:
        _, ended = await world.run(1, replace(PLAIN, constraint=broken, ignore_eos=False))
        token_ids, _ = await world.run(2, PLAIN)

    assert ended.reason is EndReason.FAILED
    assert len(token_ids) == 12


async def test_an_engine_that_calls_itself_unwell_is_dead(make: MakeEngine, tmp_path: Path) -> None:
    unhealthy = {"name": "unhealthy", "when_file": str(tmp_path / "now")}
    async with started(make(unhealthy, version="1.4.0rc1")) as world:
        token_ids, _ = await world.run(1, PLAIN)
        (tmp_path / "now").touch()
        death = await until_dead(world.engine)

    assert len(token_ids) == 12
    assert "not healthy" in death
