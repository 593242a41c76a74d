"""tools/gpu_check: the work that both sides get, and what is made of their answers."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest

from tools.conformance.engine.trtllm import worker_section
from tools.conformance.verdict import CannotShow
from tools.gpu_check.options import parse
from tools.gpu_check.throughput import Setup, engine_settings, flat, table
from tools.gpu_check.workload import Outcome, Run, Workload, together
from tools.local.place import ROOT

WORK = Workload(
    streams=(1, 32, 256), input_tokens=128, output_tokens=256, rounds=2, vocabulary=100_000
)


def test_no_two_prompts_begin_alike_and_both_sides_get_the_same() -> None:
    prompts = [
        tuple(prompt)
        for streams in WORK.streams
        for prompt in chain.from_iterable(WORK.prompts(streams, own) for own in range(streams))
    ]

    assert len(prompts) == 3 * sum(WORK.streams)
    assert len({prompt[:32] for prompt in prompts}) == len(prompts)
    assert {len(prompt) for prompt in prompts} == {128}
    assert all(0 <= token < WORK.vocabulary for prompt in prompts for token in prompt)
    assert WORK.prompts(32, 7) == WORK.prompts(32, 7)


def test_a_small_vocabulary_is_enough() -> None:
    work = Workload(streams=(4,), input_tokens=8, output_tokens=4, rounds=1, vocabulary=50)

    assert all(0 <= token < 50 for prompt in work.prompts(4, 3) for token in prompt)


def test_clients_of_one_run_are_one_run() -> None:
    parts = [
        Outcome(started_s=10.0, ended_s=12.0, tokens=300, firsts=[0.1, 0.3], failures={}),
        Outcome(started_s=10.5, ended_s=13.0, tokens=300, firsts=[0.2], failures={"X": 1}),
    ]

    run = together(3, parts)

    assert (run.streams, run.tokens, run.seconds, run.first_token_s) == (3, 600, 3.0, 0.2)
    assert (run.tokens_per_s, run.failures) == (200.0, {"X": 1})


def test_the_table_has_both_sides_and_their_ratio() -> None:
    bare = Run(streams=32, tokens=1000, seconds=1.0, first_token_s=0.01, failures={})
    suite = Run(streams=32, tokens=900, seconds=1.0, first_token_s=0.02, failures={"X": 2})

    row = table([bare], [suite])[1]

    assert row.split() == ["32", "1000.0", "900.0", "0.900", "10.0", "20.0", "2"]


@pytest.mark.parametrize(
    "name", ["worker-trtllm", "worker-trtllm-tensor-parallel", "worker-trtllm-multi-node"]
)
def test_our_example_configurations_can_be_checked(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    file = ROOT / "deploy" / "config" / "example" / f"{name}.toml"
    options = parse(["--config", str(file), "--model", str(tmp_path)])
    section = {key: value for key, value in options.section.items() if key != "lora"}

    contract = worker_section(tmp_path, tmp_path, options.section).trtllm
    setup = Setup(model=tmp_path, section=section, python=options.python, environment={}, work=WORK)

    assert contract.python == options.python
    assert contract.lora.enabled
    assert engine_settings(setup)["capacity"] == 256
    assert flat("worker.trtllm", section)["worker.trtllm.python"] == str(options.python)


def test_settings_are_flags_unless_they_are_lists() -> None:
    section = {"python": Path("/p"), "kv_cache": {"reuse": False, "dtype": "fp8"}, "none": None}

    assert flat("worker.trtllm", section) == {
        "worker.trtllm.python": "/p",
        "worker.trtllm.kv_cache.reuse": False,
        "worker.trtllm.kv_cache.dtype": "fp8",
    }
    with pytest.raises(CannotShow, match=r"cuda_graphs\.batch_sizes"):
        flat("worker.trtllm", {"cuda_graphs": {"batch_sizes": [1, 2]}})
