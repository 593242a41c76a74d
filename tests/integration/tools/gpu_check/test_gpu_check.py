"""tools/gpu_check: from the machine to the table, with the stand-in in TensorRT-LLM's place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.conformance.verdict import CannotShow
from tools.gpu_check.__main__ import FAILED, NOT_SHOWN, SHOWN, Check
from tools.gpu_check.options import parse
from tools.gpu_check.throughput import Setup, bare_runs
from tools.gpu_check.workload import Workload

SHORT = ["--streams", "1,4", "--input-tokens", "16", "--output-tokens", "16", "--rounds", "1"]


async def test_all_parts_end_in_a_table_and_a_file_without_paths(tmp_path: Path) -> None:
    said: list[str] = []
    file = tmp_path / "results.json"
    only = "nothing_comes_behind_the_end,an_embedding_may_be_cancelled"
    flags = ["--stand-in", "--only", only, "--report", str(file), *SHORT]

    code = await Check(parse(flags), tmp_path, said.append).run()

    assert code == SHOWN, said
    assert any(line.startswith("surface       TensorRT-LLM 1.2.1") for line in said)
    assert "1 passed, 0 failed, 1 not shown of 2" in said
    found = json.loads(file.read_text())
    runs = [*found["throughput"]["bare"], *found["throughput"]["suite"]]
    assert [(run["streams"], run["tokens"], run["failures"]) for run in runs] == [
        (1, 16, {}),
        (4, 64, {}),
    ] * 2
    assert all(0 < run["first_token_s"] < run["seconds"] for run in runs)
    assert str(tmp_path) not in file.read_text()
    assert found["model"]["vocab_size"] > 0


async def test_an_engine_that_does_not_load_has_last_words(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho first >&2\necho 'out of memory' >&2\nexit 1\n")
    python.chmod(0o755)
    work = Workload(streams=(1,), input_tokens=8, output_tokens=8, rounds=1, vocabulary=100)
    setup = Setup(model=tmp_path, section={}, python=python, environment={}, work=work)

    with pytest.raises(CannotShow, match="the bare LLM API failed: out of memory"):
        await bare_runs(setup)


async def test_without_a_gpu_it_says_so_and_ends(tmp_path: Path) -> None:
    said: list[str] = []
    file = tmp_path / "results.json"

    code = await Check(parse(["--report", str(file)]), tmp_path, said.append).run()

    # Where there is a GPU, TensorRT-LLM is missing, or a model was not given.
    assert code in {NOT_SHOWN, FAILED}
    assert any("TensorRT-LLM  not usable" in line for line in said)
    if "no GPU, so nothing else can be shown here" in said:
        assert (code, file.exists()) == (NOT_SHOWN, False)
