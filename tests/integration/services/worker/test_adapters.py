"""LoRA adapters: found inside one directory, checked against the catalog, loaded in time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from maas.engine.v1 import engine_pb2
from maas.engine.v1 import engine_service_pb2 as pb

from libs.errors import Code
from services.worker.engine.base import Adapter, EngineAbilities
from tests.integration.services.worker.harness import (
    TOKENIZER,
    eventually,
    execution,
    running_worker,
)
from tests.integration.services.worker.scripted import ScriptedEngine

CONTENT = b"weights of an adapter"
DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


def new_engine() -> ScriptedEngine:
    return ScriptedEngine(TOKENIZER.vocabulary_size)


def adapted(lane: int = 1, path: str = "a.gguf", digest: str = DIGEST) -> engine_pb2.Execution:
    made = execution(lane)
    made.adapter.CopyFrom(engine_pb2.AdapterRef(name="adapters/a", path=path, digest=digest))
    return made


async def test_an_adapter_is_loaded_before_its_execution_starts(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(CONTENT)
    engine = new_engine()
    async with (
        running_worker(engine=engine, adapters_dir=tmp_path) as worker,
        worker.gateway() as gateway,
    ):
        await gateway.send(adapted(1), adapted(2))
        await eventually(lambda: len(engine.running) == 2)

        want = Adapter(name="adapters/a", path=tmp_path / "a.gguf", digest=DIGEST)
        assert engine.loaded == [want]
        assert {request.adapter for request in engine.requests.values()} == {want}
        answer = await worker.peer.call(worker.stub.GetLoad, pb.GetLoadRequest())
        load = answer.load
        assert list(load.resident_adapters) == ["adapters/a"]


async def test_an_engine_that_reads_no_files_gets_a_digest() -> None:
    engine = new_engine()
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(adapted())
        await eventually(lambda: len(engine.running) == 1)

        assert engine.loaded == [Adapter(name="adapters/a", path=None, digest=DIGEST)]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("missing.gguf", "missing"),
        ("../secret", "leads out"),
        ("sub/../../secret", "leads out"),
        ("{outside}", "leads out"),
        ("link", "leads out"),
        ("linked/secret", "leads out"),
        ("sub", "not that of a file"),
        ("circle", "cannot be read"),
        ("other.gguf", "another digest"),
    ],
)
async def test_only_files_inside_the_directory_are_read(
    tmp_path: Path, path: str, said: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(CONTENT)
    folder = tmp_path / "adapters"
    (folder / "sub").mkdir(parents=True)
    (folder / "link").symlink_to(outside / "secret")
    (folder / "linked").symlink_to(outside)
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "other.gguf").write_bytes(b"other weights")
    engine = new_engine()
    async with (
        running_worker(engine=engine, adapters_dir=folder) as worker,
        worker.gateway() as gateway,
    ):
        told = await gateway.run(adapted(path=path.replace("{outside}", str(outside / "secret"))))

        assert told.failure.code == Code.FAILED_PRECONDITION
        assert told.reason == "ADAPTER_UNUSABLE"
        assert dict(told.failure.metadata) == {"adapter": "adapters/a"}
        assert said in told.failure.message
        assert str(tmp_path) not in told.failure.message
        assert engine.loaded == []
        assert worker.executions.count == 0
        assert worker.reports.take(9) == ([], [])


async def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(CONTENT)
    engine = new_engine()
    async with (
        running_worker(engine=engine, adapters_dir=tmp_path) as worker,
        worker.gateway() as gateway,
    ):
        await gateway.send(adapted(1))
        await eventually(lambda: len(engine.running) == 1)
        file.write_bytes(CONTENT + b" and more")

        told = await gateway.run(adapted(2))

        assert "another digest" in told.failure.message


async def test_what_the_engine_cannot_load_is_said_with_its_reason() -> None:
    engine = new_engine()
    engine.refusal = "tensor blk.0 has another shape"
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        told = await gateway.run(adapted())

        assert told.reason == "ADAPTER_UNUSABLE"
        assert "another shape" in told.failure.message


async def test_without_the_ability_an_adapter_is_refused_by_its_field() -> None:
    engine = ScriptedEngine(TOKENIZER.vocabulary_size, abilities=EngineAbilities())
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        told = await gateway.run(adapted())

        assert told.reason == "FEATURE_UNSUPPORTED"
        assert told.failure.message.startswith("spec.adapter:")


async def test_a_directory_that_is_missing_makes_every_adapter_unusable(tmp_path: Path) -> None:
    engine = new_engine()
    async with (
        running_worker(engine=engine, adapters_dir=tmp_path / "no") as worker,
        worker.gateway() as gateway,
    ):
        assert (await gateway.run(adapted())).reason == "ADAPTER_UNUSABLE"
