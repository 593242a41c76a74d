"""LoRA adapters and embeddings of the llamacpp engine, against numpy."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from services.worker.engine.base import (
    Adapter,
    AdapterUnusable,
    EmbeddingFailed,
    EndReason,
    EngineDied,
)
from services.worker.engine.llamacpp import LlamaCppEngine
from services.worker.engine.llamacpp_adapters import RESIDENT_MAX
from services.worker.engine.wire import Kind
from tests.integration.services.worker.engine.llamacpp_bench import (
    CONTEXT,
    DRAWN,
    MODEL,
    PATIENCE_S,
    STORY,
    TOLERANCE,
    Bench,
    RecordingEngine,
    ask,
    running_bench,
)
from tests.integration.services.worker.engine.llamacpp_reference import Reference, write_adapter

# One engine for the whole module; every test uses salts of its own.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench() -> AsyncIterator[Bench]:
    async with running_bench() as bench:
        yield bench


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(MODEL)


@pytest.fixture(scope="module")
def adapter_file(tmp_path_factory: pytest.TempPathFactory, reference: Reference) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "a.gguf"
    write_adapter(path, reference, seed=1)
    return path


# Adapters.


def adapter_at(path: Path, *, number: int = 1) -> Adapter:
    return Adapter(name=f"adapters/{number}", path=path, digest=f"sha256:{number}")


async def test_an_adapter_gives_what_merged_weights_give_and_base_stays_as_it_was(
    bench: Bench, adapter_file: Path, tmp_path: Path
) -> None:
    merged = Reference(MODEL)
    for name, added in write_adapter(tmp_path / "same.gguf", merged, seed=1).items():
        merged.weights[name] = merged.weights[name] + added
    adapter = adapter_at(adapter_file)
    (before,) = await bench.run(ask(top_logprobs=1))
    await bench.engine.load_adapter(adapter)
    await bench.engine.load_adapter(adapter)
    assert bench.engine.load().resident_adapters == ("adapters/1",)

    adapted, base = await bench.run(
        ask(adapter=adapter, top_logprobs=1, cache_salt=b"l"), ask(cache_salt=b"l")
    )
    (after,) = await bench.run(ask(cache_salt=b"l"))

    assert before.ids == base.ids == after.ids
    assert after.cached == len(STORY) - 1
    expected = merged.logprobs((*STORY, *adapted.ids))[len(STORY) - 1 : -1]
    for place, token_id in enumerate(adapted.ids):
        assert adapted.logprobs[place] == pytest.approx(expected[place, token_id], abs=TOLERANCE)
        # Nothing is likelier than what was taken, but for what rounding decides.
        assert expected[place].max() - expected[place, token_id] < TOLERANCE
    unadapted = Reference(MODEL).logprobs((*STORY, *adapted.ids))[len(STORY) - 1 : -1]
    differences = np.abs(unadapted - expected).max(axis=1)
    assert differences.min() > 4 * TOLERANCE


async def test_an_adapter_that_was_dropped_is_loaded_again(
    bench: Bench, adapter_file: Path
) -> None:
    first = adapter_at(adapter_file, number=100)
    await bench.engine.load_adapter(first)
    (before,) = await bench.run(ask(adapter=first, cache_salt=b"dropped"))
    for number in range(101, 101 + RESIDENT_MAX):
        await bench.engine.load_adapter(adapter_at(adapter_file, number=number))
    names = bench.engine.load().resident_adapters
    assert len(names) == RESIDENT_MAX
    assert first.name not in names

    (after,) = await bench.run(ask(adapter=first, cache_salt=b"again"))

    assert after.ids == before.ids
    assert first.name in bench.engine.load().resident_adapters


async def test_a_file_that_is_no_adapter_of_this_model_is_refused_and_harms_nobody(
    bench: Bench, reference: Reference, tmp_path: Path
) -> None:
    running = bench.submit(ask(200))
    foreign = tmp_path / "foreign.gguf"
    write_adapter(foreign, reference, seed=2, architecture="gpt2")
    text = tmp_path / "text.gguf"
    text.write_text("no adapter", "utf-8")
    for path in (foreign, text, MODEL, tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(AdapterUnusable):
            await bench.engine.load_adapter(adapter_at(path, number=666))

    (failed,) = await bench.run(ask(adapter=adapter_at(text, number=666)))

    assert failed.ended is not None
    assert failed.ended.reason is EndReason.FAILED
    while bench.told[running].ended is None:
        await bench.step()
    assert len(bench.told[running].ids) == 200


# Embeddings.


async def test_embeddings_are_the_mean_of_the_last_states(
    bench: Bench, reference: Reference
) -> None:
    inputs = [STORY, STORY[:1], tuple(np.random.default_rng(5).integers(16, 2000, 250).tolist())]

    got = await bench.engine.embed([*inputs, STORY])

    assert got.shape == (4, 256)
    assert got.dtype == np.float32
    assert np.linalg.norm(got, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    assert (got[0] == got[3]).all()
    for row, ids in enumerate(inputs):
        mean = reference.states(ids).mean(axis=0)
        assert got[row] @ (mean / np.linalg.norm(mean)) > 0.999


async def test_generation_goes_on_beside_embedding(bench: Bench) -> None:
    (alone,) = await bench.run(ask(100, DRAWN))
    inputs = [tuple(range(16, 16 + CONTEXT - 1))] * 12

    RecordingEngine.kinds.clear()
    embedding = asyncio.ensure_future(bench.engine.embed(inputs))
    await asyncio.sleep(0)
    (beside,) = await bench.run(ask(100, DRAWN, reads_cache=False))

    assert (await embedding).shape == (12, 256)
    assert beside.ids == alone.ids
    # One step of generation for each of embedding.
    kinds = RecordingEngine.kinds
    assert kinds[: kinds.index(Kind.EMBEDDED)].count(Kind.STEP) > 10


async def test_a_cancelled_embedding_leaves_nothing_behind(bench: Bench) -> None:
    cancelled = asyncio.ensure_future(bench.engine.embed([STORY * 15] * 50))
    await asyncio.sleep(0)

    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)

    assert (await bench.engine.embed([STORY])).shape == (1, 256)


@pytest.mark.parametrize(
    "inputs", [[(2048,)], [(-1,)], [(2**40,)], [()], [(5,) * (CONTEXT + 1)], []], ids=str
)
async def test_what_cannot_be_embedded_is_refused(
    bench: Bench, inputs: list[tuple[int, ...]]
) -> None:
    with pytest.raises(EmbeddingFailed):
        await bench.engine.embed(inputs)


async def test_questions_to_an_engine_that_dies_end() -> None:
    engine = LlamaCppEngine(MODEL, capacity=1, context_length=CONTEXT, threads=1)
    await engine.start()
    asking = [
        asyncio.ensure_future(engine.embed([STORY * 15] * 200)),
        asyncio.ensure_future(engine.load_adapter(adapter_at(MODEL))),
    ]
    await asyncio.sleep(0)
    assert engine._process is not None
    os.kill(engine._process.pid, 9)

    async with asyncio.timeout(PATIENCE_S):
        outcomes = await asyncio.gather(*asking, return_exceptions=True)

    assert isinstance(outcomes[0], EngineDied)
    assert isinstance(outcomes[1], EngineDied | AdapterUnusable)
    for question in (engine.embed([STORY]), engine.load_adapter(adapter_at(MODEL))):
        with pytest.raises(EngineDied):
            await question
    await engine.stop()
