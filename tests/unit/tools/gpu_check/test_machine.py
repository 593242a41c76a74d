"""tools/gpu_check/machine.py: what there is, and why something is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools.gpu_check.machine import Installed, Machine, find_gpus, find_installed, requirements


def program(folder: Path, text: str) -> str:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_gpus_are_read_off_nvidia_smi(tmp_path: Path) -> None:
    lines = "NVIDIA H100 80GB HBM3, 580.95.05, 81559, 4, 9.0\nNVIDIA L4, 580.95.05, 23034, 0, 8.9"

    gpus, problem = find_gpus(program(tmp_path, f"echo '{lines}'"))

    assert problem == ""
    assert [(gpu.name, gpu.memory_mib, gpu.capability) for gpu in gpus] == [
        ("NVIDIA H100 80GB HBM3", "81559", "9.0"),
        ("NVIDIA L4", "23034", "8.9"),
    ]
    assert gpus[0].line.startswith("NVIDIA H100 80GB HBM3, driver 580.95.05, 81559 MiB (4 used)")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo no devices were found; exit 6", "nvidia-smi failed: no devices were found"),
        ("true", "lists none"),
        ("echo what is this", "lists none"),
    ],
)
def test_no_gpu_has_a_reason(tmp_path: Path, text: str, words: str) -> None:
    gpus, problem = find_gpus(program(tmp_path, text))

    assert gpus == []
    assert words in problem


def test_without_a_driver_that_is_the_reason(tmp_path: Path) -> None:
    assert find_gpus(str(tmp_path / "none")) == (
        [],
        "there is no nvidia-smi: install NVIDIA's driver",
    )


def test_what_the_engines_python_lacks_is_said(tmp_path: Path) -> None:
    found = find_installed(Path(sys.executable), {})

    assert found.python.startswith("3.")
    assert "numpy" in found.versions
    assert found.conflicts == []
    assert found.surface == ""
    assert found.problem.startswith("TensorRT-LLM is not installed")
    assert "cannot be run" in find_installed(tmp_path / "python", {}).problem


def test_packages_that_contradict_are_named_only_where_they_matter() -> None:
    engine = Installed(python="3.12.3", conflicts=["numpy 1.26.4, the suite needs >=2.2,<3"])
    shared = Machine(
        system="s", python="3.12", gpus=[], gpu_problem="p", engine=engine, is_shared=True
    )
    apart = Machine(
        system="s", python="3.12", gpus=[], gpu_problem="p", engine=engine, is_shared=False
    )

    assert any("conflict      numpy 1.26.4" in line for line in shared.lines())
    assert not any("conflict" in line for line in apart.lines())
    assert any(text.startswith("numpy") for text in requirements())
