from __future__ import annotations

from pathlib import Path

import pytest
from typing_extensions import override

from libs.clock import SystemClock
from libs.testing import FakeClock
from services.worker.adapters import AdapterForm
from services.worker.config import WorkerSection
from services.worker.engine.base import (
    AdapterUnusable,
    Ended,
    EndReason,
    EngineDied,
    EngineStartError,
    StepBatch,
)
from services.worker.engine.sim import FLAT_OUT, SimCosts, SimEngine
from services.worker.engine.sim_tokenizer import SimTokenizer
from services.worker.engine.trtllm import TrtllmEngine
from services.worker.engine.trtllm_settings import read_settings
from services.worker.engines import make_equipment, probe
from tests.standins.tiny_hf_model import write_adapter, write_model

TOKENIZER = SimTokenizer()


class Broken(SimEngine):
    """Answers every execution in one way."""

    answer: Exception | Ended

    @override
    async def next_step(self) -> StepBatch:
        if isinstance(self.answer, Exception):
            raise self.answer
        return StepBatch(ended=[self.answer])


def sizes() -> dict[str, int]:
    return {"capacity": 1, "context_length": 64, "kv_tokens": 64}


async def test_an_engine_that_draws_a_token_is_good() -> None:
    engine = SimEngine(SystemClock(), TOKENIZER, costs=FLAT_OUT, **sizes())

    await probe(engine, 5)

    assert engine.load().running == 0


async def test_an_engine_that_draws_nothing_is_not() -> None:
    engine = SimEngine(FakeClock(), TOKENIZER, costs=SimCosts(), **sizes())

    with pytest.raises(EngineStartError, match="no token within"):
        await probe(engine, 0.01)
    await engine.stop()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (EngineDied("out of memory"), "out of memory"),
        (Ended(0, EndReason.FAILED, message="bad tensor"), "bad tensor"),
    ],
)
async def test_an_engine_that_fails_says_why(answer: Exception | Ended, said: str) -> None:
    engine = Broken(SystemClock(), TOKENIZER, costs=FLAT_OUT, **sizes())
    engine.answer = answer

    with pytest.raises(EngineStartError, match=said):
        await probe(engine, 5)


def test_a_directory_of_a_model_becomes_an_engine_that_has_not_started(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", vocabulary="sentencepiece")
    config = trtllm(model.folder, lora={"enabled": True, "max_rank": 4}, adapters_dir=tmp_path)

    equipment = make_equipment(config, SystemClock())

    assert isinstance(equipment.engine, TrtllmEngine)
    assert equipment.tokenizer.vocabulary_size >= max(model.eos_ids)
    assert equipment.bos_id == model.bos_id
    assert equipment.reads_adapters is AdapterForm.DIRECTORY


def test_the_engine_is_told_what_was_configured(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", context=512)
    digest = "sha256:" + "0" * 64
    config = trtllm(model.folder, statistics={"kv_events": False}).model_copy(
        update={"context_length": 4096, "digest": digest}
    )

    engine = make_equipment(config, SystemClock()).engine

    assert isinstance(engine, TrtllmEngine)
    told = read_settings(engine._settings)
    assert (told.model_path, told.capacity) == (model.folder, 256)
    # Not more than the model has.
    assert told.context_length == 512
    assert told.expected_digest == digest
    assert not told.values("statistics").flag("kv_events")


def test_an_adapter_is_compared_with_the_model_and_with_what_was_configured(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    config = trtllm(model.folder, lora={"enabled": True, "max_rank": 4}, adapters_dir=tmp_path)

    check = make_equipment(config, SystemClock()).check_adapter

    assert check is not None
    check(write_adapter(tmp_path / "good", rank=4))
    with pytest.raises(AdapterUnusable, match=r"within 1\.\.4"):
        check(write_adapter(tmp_path / "wide", rank=8))


def test_a_directory_that_is_no_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(EngineStartError, match=r"config\.json"):
        make_equipment(trtllm(tmp_path), SystemClock())


def trtllm(folder: Path, *, adapters_dir: Path | None = None, **section: object) -> WorkerSection:
    values = {
        "name": "w1",
        "endpoint": "h:1",
        "model_version": "models/m/versions/1",
        "engine": "trtllm",
        "model_path": folder,
        "adapters_dir": adapters_dir,
        "trtllm": section,
    }
    return WorkerSection.model_validate(values)
