"""The file that llama.cpp loads is the one that is wanted, or llama.cpp never sees it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from libs.clock import SystemClock
from services.worker.config import WorkerSection
from services.worker.engine.base import EngineStartError, LoadProgress, LoadStage
from services.worker.engine.llamacpp import LlamaCppEngine
from services.worker.engines import make_equipment
from tests.integration.services.worker.test_process import MODEL

WANTED = "sha256:" + "ab" * 32


def no_model(folder: Path) -> tuple[Path, str]:
    """A file that llama.cpp could not even open, and its digest."""
    path = folder / "model.gguf"
    path.write_bytes(b"GGUF and nothing else")
    return path, f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


async def test_a_file_with_another_digest_is_not_opened(tmp_path: Path) -> None:
    path, digest = no_model(tmp_path)
    engine = LlamaCppEngine(path, capacity=1, threads=1, expected_digest=WANTED)

    with pytest.raises(EngineStartError) as caught:
        await engine.start()

    assert digest in str(caught.value)
    assert WANTED in str(caught.value)
    assert str(path) in str(caught.value)


def test_the_worker_does_not_read_its_vocabulary_either(tmp_path: Path) -> None:
    path, digest = no_model(tmp_path)
    config = WorkerSection.model_validate(
        {
            "name": "w1",
            "endpoint": "h:1",
            "model_version": "models/tiny/versions/1",
            "engine": "llamacpp",
            "model_path": str(path),
            "digest": WANTED,
        }
    )

    with pytest.raises(EngineStartError, match=digest):
        make_equipment(config, SystemClock())


async def test_the_right_file_is_checked_and_then_loaded() -> None:
    digest = f"sha256:{hashlib.sha256(MODEL.read_bytes()).hexdigest()}"
    engine = LlamaCppEngine(MODEL, capacity=1, context_length=64, threads=1, expected_digest=digest)
    told: list[LoadProgress] = []
    try:
        info = await engine.start(told.append)
    finally:
        await engine.stop()

    assert info.digest == digest
    assert told == [LoadProgress(LoadStage.CHECKING, 1.0), LoadProgress(LoadStage.LOADING)]
