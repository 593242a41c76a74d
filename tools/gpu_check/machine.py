"""What there is: GPUs, the engine's Python, TensorRT-LLM and its surface, package versions."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.local.place import ROOT

QUERY_S = 30.0
DETECT_S = 180.0
"""Importing TensorRT-LLM takes its time, above all the first one."""
_SHOWN_MAX = 300
_QUERY = ("name", "driver_version", "memory.total", "memory.used", "compute_cap")
_MARK = "GPU_CHECK "
# Runs in the engine's Python: looks at what is installed there, and imports as little as it can.
_LOOK = """
import importlib.metadata as metadata, json, platform, sys
wanted = json.loads(sys.argv[1])
found = {"python": platform.python_version(), "versions": {}, "conflicts": []}
for name in ("tensorrt_llm", "torch", "transformers", "numpy", "tokenizers", "llguidance"):
    try:
        found["versions"][name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
try:
    from packaging.requirements import Requirement
except ImportError:
    found["conflicts"] = None
else:
    for text in wanted:
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate():
            continue
        try:
            version = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            continue
        if not needed.specifier.contains(version, prereleases=True):
            text = f"{needed.name} {version}, the suite needs {needed.specifier}"
            found["conflicts"].append(text)
print("GPU_CHECK " + json.dumps(found))
"""
_DETECT = """
import json, sys
from services.worker.engine.base import EngineStartError
from services.worker.engine.trtllm_surface import detect
try:
    print("\\nGPU_CHECK " + json.dumps(detect().describe()))
except EngineStartError as error:
    sys.exit(str(error))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU, as nvidia-smi has it.

    Attributes:
        name: of the product.
        driver: version.
        memory_mib: all of it.
        used_mib: of it, now.
        capability: of its architecture, as "9.0".
    """

    name: str
    driver: str
    memory_mib: str
    used_mib: str
    capability: str

    @property
    def line(self) -> str:
        """For people."""
        return (
            f"{self.name}, driver {self.driver}, {self.memory_mib} MiB ({self.used_mib} used), "
            f"compute capability {self.capability}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """What the engine's Python has.

    Attributes:
        python: its version; empty when it does not run.
        versions: of packages that matter.
        conflicts: packages whose version the suite does not take; None when nobody could compare.
        surface: of TensorRT-LLM; empty when it is missing or unusable.
        problem: why, then.
    """

    python: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    conflicts: Sequence[str] | None = ()
    surface: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """All of it.

    Attributes:
        system: operating system and architecture.
        python: version of the suite's Python.
        gpus: that nvidia-smi lists.
        gpu_problem: why there are none.
        engine: what the engine's Python has.
        is_shared: the engine's Python is the suite's, so that contradictions matter.
    """

    system: str
    python: str
    gpus: Sequence[Gpu]
    gpu_problem: str
    engine: Installed
    is_shared: bool

    def lines(self) -> list[str]:
        """For people."""
        found = [f"system        {self.system}, Python {self.python}"]
        found += [f"GPU {number}         {gpu.line}" for number, gpu in enumerate(self.gpus)]
        if not self.gpus:
            found.append(f"GPU           none: {self.gpu_problem}")
        engine = self.engine
        where = "the suite's own" if self.is_shared else "an environment of its own"
        found.append(f"engine        Python {engine.python or 'does not run'}, {where}")
        found += [f"              {name} {version}" for name, version in engine.versions.items()]
        if self.is_shared and engine.conflicts is None:
            found.append("packages      not compared: the package `packaging` is missing")
        elif self.is_shared:
            found += [f"conflict      {conflict}" for conflict in engine.conflicts or ()]
        if engine.surface:
            found.append(f"surface       {engine.surface}")
        else:
            found.append(f"TensorRT-LLM  not usable: {engine.problem}")
        return found


def look(python: Path, environment: Mapping[str, str], *, is_shared: bool) -> Machine:
    """Looks at the machine; takes a few minutes at the most.

    Args:
        python: the engine's.
        environment: variables that it needs.
        is_shared: it is the suite's own.
    """
    gpus, problem = find_gpus()
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        gpus=gpus,
        gpu_problem=problem,
        engine=find_installed(python, environment),
        is_shared=is_shared,
    )


def find_gpus(program: str = "nvidia-smi") -> tuple[list[Gpu], str]:
    """GPUs of this machine, or why there are none."""
    try:
        done = subprocess.run(
            [program, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=False,
            timeout=QUERY_S,
        )
    except FileNotFoundError:
        return [], "there is no nvidia-smi: install NVIDIA's driver"
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi did not answer within {QUERY_S:.0f} s: look at the driver"
    if done.returncode != 0:
        return [], f"nvidia-smi failed: {(done.stderr or done.stdout).strip()[:_SHOWN_MAX]}"
    gpus = [found for line in done.stdout.splitlines() if (found := _gpu(line)) is not None]
    return gpus, "" if gpus else "nvidia-smi lists none"


def _gpu(line: str) -> Gpu | None:
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != len(_QUERY):
        return None
    name, driver, memory_mib, used_mib, capability = parts
    return Gpu(
        name=name, driver=driver, memory_mib=memory_mib, used_mib=used_mib, capability=capability
    )


def find_installed(python: Path, environment: Mapping[str, str]) -> Installed:
    """What the engine's Python has. Imports TensorRT-LLM there, in a process of its own."""
    looked = _answer_of(python, [_LOOK, json.dumps(requirements())], environment, QUERY_S)
    if isinstance(looked, str):
        return Installed(problem=looked)
    found = json.loads(looked[0])
    detected = _answer_of(python, [_DETECT], environment, DETECT_S)
    surface, problem = "", ""
    if isinstance(detected, str):
        problem = detected
    else:
        surface = json.loads(detected[0])
    return Installed(
        python=found["python"],
        versions=found["versions"],
        conflicts=found["conflicts"],
        surface=surface,
        problem=problem,
    )


def requirements() -> list[str]:
    """What the suite needs, as pyproject.toml says, or what was installed from it."""
    path = ROOT / "pyproject.toml"
    if path.is_file():
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        return [str(text) for text in project["dependencies"]]
    try:
        return importlib.metadata.requires("maas") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _answer_of(
    python: Path, arguments: Sequence[str], environment: Mapping[str, str], limit_s: float
) -> tuple[str] | str:
    """The marked line that a program printed, in a tuple, or why there is none."""
    try:
        done = subprocess.run(
            [str(python), "-c", *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},  # noqa: TID251 - for a child
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s,
        )
    except OSError as error:
        return f"{python} cannot be run: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"no answer within {limit_s:.0f} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if lines:
        return (lines[-1].removeprefix(_MARK),)
    words = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    return words[0][:_SHOWN_MAX]
