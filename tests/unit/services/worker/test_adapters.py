"""Adapters that are directories: found, compared and checked before the engine sees them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from maas.engine.v1 import engine_pb2
from typing_extensions import override

from libs.clock import SystemClock
from libs.errors import FailedPrecondition, Reason
from services.worker.adapters import AdapterForm, Adapters
from services.worker.engine.base import Adapter, AdapterUnusable
from services.worker.engine.hf_adapter import CONFIG_FILE, WEIGHTS_FILE, adapter_digest
from services.worker.engine.sim import FLAT_OUT, SimEngine
from services.worker.engine.sim_tokenizer import SimTokenizer


class Noting(SimEngine):
    """Notes what it is asked to load."""

    def __init__(self) -> None:
        super().__init__(
            SystemClock(),
            SimTokenizer(),
            capacity=1,
            context_length=64,
            kv_tokens=64,
            costs=FLAT_OUT,
        )
        self.asked: list[Adapter] = []

    @override
    async def load_adapter(self, adapter: Adapter) -> None:
        self.asked.append(adapter)


class Judge:
    """Sees whether an adapter fits; its weights say so."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, directory: Path) -> None:
        self.asked += 1
        if (directory / WEIGHTS_FILE).read_bytes() == b"too wide":
            raise AdapterUnusable("its rank r is not within 1..8")


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "tidy"
    made.mkdir()
    (made / CONFIG_FILE).write_text("{}")
    (made / WEIGHTS_FILE).write_bytes(b"weights")
    return made


def make_adapters(
    engine: SimEngine, parent: Path, threads: ThreadPoolExecutor, judge: Judge
) -> Adapters:
    return Adapters(
        engine,
        parent,
        form=AdapterForm.DIRECTORY,
        threads=threads,
        load_within_s=5,
        check=judge,
    )


def wanted(digest: str, path: str = "tidy") -> engine_pb2.AdapterRef:
    return engine_pb2.AdapterRef(name="adapters/tidy", path=path, digest=digest)


async def refusal(adapters: Adapters, ref: engine_pb2.AdapterRef) -> str:
    with pytest.raises(FailedPrecondition) as refused:
        await adapters.ready(ref)
    assert refused.value.reason is Reason.ADAPTER_UNUSABLE
    return str(refused.value)


async def test_the_engine_gets_a_directory_that_fits(
    directory: Path, threads: ThreadPoolExecutor
) -> None:
    engine, digest = Noting(), adapter_digest(directory)

    found = await make_adapters(engine, directory.parent, threads, Judge()).ready(wanted(digest))

    assert found == Adapter(name="adapters/tidy", path=directory, digest=digest)
    assert engine.asked == [found]


async def test_an_adapter_that_does_not_fit_never_reaches_the_engine(
    directory: Path, threads: ThreadPoolExecutor
) -> None:
    engine = Noting()
    (directory / WEIGHTS_FILE).write_bytes(b"too wide")
    adapters = make_adapters(engine, directory.parent, threads, Judge())

    said = await refusal(adapters, wanted(adapter_digest(directory)))

    assert "its rank r is not within 1..8" in said
    assert engine.asked == []


async def test_an_adapter_is_checked_again_only_when_it_has_changed(
    directory: Path, threads: ThreadPoolExecutor
) -> None:
    judge = Judge()
    adapters = make_adapters(Noting(), directory.parent, threads, judge)
    digest = adapter_digest(directory)
    await adapters.ready(wanted(digest))
    await adapters.ready(wanted(digest))
    assert judge.asked == 1

    (directory / WEIGHTS_FILE).write_bytes(b"weights!")
    assert "another digest" in await refusal(adapters, wanted(digest))
    await adapters.ready(wanted(adapter_digest(directory)))

    assert judge.asked == 2


async def test_a_new_configuration_is_another_adapter(
    directory: Path, threads: ThreadPoolExecutor
) -> None:
    adapters = make_adapters(Noting(), directory.parent, threads, Judge())
    digest = adapter_digest(directory)
    await adapters.ready(wanted(digest))

    (directory / CONFIG_FILE).write_text("{ }")

    assert "its directory has another digest" in await refusal(adapters, wanted(digest))


async def test_a_directory_without_weights_is_refused(
    directory: Path, threads: ThreadPoolExecutor
) -> None:
    (directory / WEIGHTS_FILE).unlink()
    adapters = make_adapters(Noting(), directory.parent, threads, Judge())

    said = await refusal(adapters, wanted("sha256:" + "0" * 64))

    assert "its directory is missing or cannot be read" in said


async def test_a_file_is_no_directory(directory: Path, threads: ThreadPoolExecutor) -> None:
    adapters = make_adapters(Noting(), directory.parent, threads, Judge())

    said = await refusal(adapters, wanted("sha256:" + "0" * 64, f"tidy/{CONFIG_FILE}"))

    assert "not that of a directory" in said


async def test_weights_that_lie_elsewhere_are_not_read(
    directory: Path, tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    outside = tmp_path / "secret"
    (directory / WEIGHTS_FILE).replace(outside)
    (directory / WEIGHTS_FILE).symlink_to(outside)
    adapters = make_adapters(Noting(), directory.parent, threads, Judge())

    said = await refusal(adapters, wanted("sha256:" + "0" * 64))

    assert "leads out of the directory" in said
