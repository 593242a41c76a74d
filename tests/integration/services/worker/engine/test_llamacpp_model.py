"""The bits of the logits, which is what exactness rests on, and sampling from real ones."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from services.worker.engine.base import EngineRequest, EngineStartError, Sampling
from services.worker.engine.llamacpp_decoder import DecodeFailedError
from services.worker.engine.llamacpp_inflight import InflightBatch
from services.worker.engine.llamacpp_model import LlamaModel, ModelSettings
from services.worker.engine.llamacpp_sampling import streams_of, uniform

MODEL = Path(__file__).parents[5] / "services" / "worker" / "models" / "maas-tiny-story.gguf"
CAPACITY = 4
PREFILL = 128


SETTINGS = ModelSettings(
    path=MODEL,
    capacity=CAPACITY,
    context_length=None,
    threads=1,
    kv_dtype_k="q8_0",
    kv_dtype_v="f16",
    prefill_tokens=PREFILL,
)


@pytest.fixture(scope="module")
def model() -> LlamaModel:
    return LlamaModel(SETTINGS)


def ids_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(16, 2000), k=length)  # noqa: S311 - no secret


def decode(model: LlamaModel, rows: list[tuple[int, int, int]]) -> bytes:
    """Bits of the logits of slot 1's last row."""
    count = len(rows)
    rows = sorted(rows, key=lambda row: (row[2], row[1]))
    columns = np.array(rows, np.int32)
    model.tokens[:count], model.positions[:count], model.slots[:count] = columns.T
    model.wanted[:count] = 0
    model.wanted[np.flatnonzero(columns[:, 2] == 1)[-1]] = 1
    return model.decode(count).tobytes()


def prefill(model: LlamaModel, ids: list[int], *, chunk: int, slot: int = 1) -> bytes:
    bits = b""
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        rows = [(token, start + i, slot) for i, token in enumerate(part)]
        bits = decode(model, rows if slot == 1 else [*rows, (5, start // chunk, 1)])
    return bits


@pytest.mark.parametrize(("length", "chunk"), [(30, 1), (30, 7), (540, 1), (540, 64)])
def test_logits_have_the_same_bits_however_a_prompt_is_cut(
    model: LlamaModel, length: int, chunk: int
) -> None:
    ids = ids_of(length, seed=1)
    model.forget(1, 0)
    whole = prefill(model, ids, chunk=PREFILL)
    model.forget(1, 0)

    assert prefill(model, ids, chunk=chunk) == whole


@pytest.mark.parametrize("length", [30, 540])
def test_logits_have_the_same_bits_alone_and_in_company(model: LlamaModel, length: int) -> None:
    ids = ids_of(length, seed=2)
    model.forget(1, 0)
    prefill(model, ids, chunk=PREFILL)
    alone = decode(model, [(77, length, 1)])
    for slot in (0, 2, 3):
        model.forget(slot, 0)

    for company in ((0,), (0, 2), (0, 2, 3), (3,)):
        model.forget(1, length)
        rows = [(100 + slot, 0, slot) for slot in company]
        assert decode(model, [*rows, (77, length, 1)]) == alone
        for slot in company:
            model.forget(slot, 0)


def test_only_what_was_measured_exact_is_called_deterministic(model: LlamaModel) -> None:
    assert model.is_deterministic
    assert not LlamaModel(dataclasses.replace(SETTINGS, kv_dtype_k="f16")).is_deterministic


def test_drawn_tokens_follow_the_rule_on_the_model_s_logits(model: LlamaModel) -> None:
    """A plain sampler, fed by its own passes over the model, gets the engine's tokens."""
    sampling = Sampling(temperature=0.9, top_p=0.8, top_k=30, seed=99)
    prompt = ids_of(12, seed=3)
    batch = InflightBatch(model, capacity=CAPACITY, context_length=1024, prefill_tokens=PREFILL)
    request = EngineRequest(
        prompt_ids=tuple(prompt), max_output_tokens=12, ignore_eos=True, sampling=sampling
    )
    batch.submit(5, request)
    while not batch.is_idle:
        batch.step()
    got = np.frombuffer(batch.take_report()[1].token_ids, np.int32).tolist()

    expected: list[int] = []
    for position in range(12):
        model.forget(1, 0)
        bits = prefill(model, prompt + expected, chunk=PREFILL)
        logits = np.frombuffer(bits, np.float32).astype(np.float64)
        weights = np.exp((logits - logits.max()) / sampling.temperature)
        kept = np.argsort(-weights, kind="stable")[: sampling.top_k]
        sums = np.cumsum(weights[kept])
        nucleus = np.sort(kept[: int(np.searchsorted(sums, sampling.top_p * sums[-1])) + 1])
        shares = np.cumsum(weights[nucleus]) / weights[nucleus].sum()
        number = uniform(streams_of([sampling.seed]), np.array([position]))[0]
        expected.append(int(nucleus[np.searchsorted(shares, number, "right")]))

    assert got == expected


def test_a_failed_call_names_no_token(model: LlamaModel) -> None:
    model.forget(1, 0)

    with pytest.raises(DecodeFailedError, match="llama_decode answered -1") as failure:
        decode(model, [(54321, 0, 1)])

    assert "54321" not in str(failure.value)


def make_missing(folder: Path) -> Path:
    return folder / "there-is-none.gguf"


def make_folder(folder: Path) -> Path:
    return folder


def make_text(folder: Path) -> Path:
    path = folder / "text.gguf"
    path.write_text("This is no model.", "utf-8")
    return path


def make_empty(folder: Path) -> Path:
    path = folder / "empty.gguf"
    path.touch()
    return path


def make_truncated(folder: Path) -> Path:
    path = folder / "truncated.gguf"
    path.write_bytes(MODEL.read_bytes()[:2_000_000])
    return path


def make_header_only(folder: Path) -> Path:
    path = folder / "header.gguf"
    path.write_bytes(MODEL.read_bytes()[:100])
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_missing, r"cannot be read.*No such file.*there-is-none\.gguf"),
        (make_folder, "cannot be read.*Is a directory"),
        (make_text, r"text\.gguf is not a GGUF file"),
        (make_empty, "is not a GGUF file"),
        (make_truncated, r"cannot load .*truncated\.gguf.*file bounds"),
        (make_header_only, r"cannot load .*header\.gguf"),
    ],
)
def test_a_file_that_is_no_model_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    settings = dataclasses.replace(SETTINGS, path=make(tmp_path))

    with pytest.raises(EngineStartError, match=message):
        LlamaModel(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dataclasses.replace(SETTINGS, capacity=0), "capacity is 0, not 1 to 256"),
        (dataclasses.replace(SETTINGS, capacity=257), "capacity is 257"),
        (dataclasses.replace(SETTINGS, threads=0), "threads is 0"),
        (dataclasses.replace(SETTINGS, context_length=0), "trained for 1 to 1024 tokens"),
        (dataclasses.replace(SETTINGS, context_length=1025), "trained for 1 to 1024 tokens"),
        (dataclasses.replace(SETTINGS, prefill_tokens=0), "prefill_tokens is 0"),
        (dataclasses.replace(SETTINGS, kv_dtype_k="q4_0"), "none of f32, f16, q8_0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: ModelSettings, message: str) -> None:
    with pytest.raises(EngineStartError, match=message):
        LlamaModel(settings)
