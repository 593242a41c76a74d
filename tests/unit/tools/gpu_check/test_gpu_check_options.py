"""tools/gpu_check/options.py: what a run can be asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools.gpu_check.options import OptionError, parse


def test_defaults_look_at_everything_with_our_own_python() -> None:
    got = parse([])

    assert (got.model, got.streams, got.parts) == (None, (1, 32, 256), ("contract", "throughput"))
    assert (got.python, got.is_shared) == (Path(sys.executable), True)


def test_a_worker_configuration_says_how_the_engine_runs(tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.write_text(
        '[worker]\nengine = "trtllm"\n[worker.trtllm]\npython = "/opt/trtllm/bin/python"\n'
        "[worker.trtllm.parallelism]\ntensor = 4\n"
    )

    got = parse(["--config", str(file)])
    other = parse(["--config", str(file), "--python", "/usr/bin/python3"])

    assert (got.python, got.is_shared) == (Path("/opt/trtllm/bin/python"), False)
    assert got.section["parallelism"] == {"tensor": 4}
    assert (other.python, other.section["python"]) == (Path("/usr/bin/python3"), "/usr/bin/python3")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "/nowhere"], "no config.json"),
        (["--streams", "1,x"], "--streams"),
        (["--streams", "0"], "--streams"),
        (["--rounds", "0"], "--rounds"),
        (["--parts", "money"], "there is no money"),
        (["--only", "U3"], "there is no U3"),
        (["--config", "/nowhere.toml"], "cannot be read"),
    ],
)
def test_what_cannot_be_is_refused(flags: list[str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        parse(flags)


def test_a_bad_configuration_is_refused_by_its_key(tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.write_text("[worker.trtllm.parallelism]\ntensor = 0\n")

    with pytest.raises(OptionError, match=r"worker\.trtllm\.parallelism\.tensor"):
        parse(["--config", str(file)])
