"""What a run of the check was asked for."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pydantic

from services.worker.trtllm_config import TrtllmSection
from tools.conformance.engine.run import known_names

PARTS = ("contract", "throughput")
_STREAMS = (1, 32, 256)
_STREAMS_MAX = 4096
_SECTION = ("worker", "trtllm")


class OptionError(Exception):
    """The flags do not go together, or a file cannot be read; the text says what."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to do.

    Attributes:
        model: directory of a Hugging Face model; None for looking at the machine alone.
        section: [worker.trtllm] of the configuration that both sides run with.
        python: that has tensorrt_llm.
        is_shared: it is the suite's own.
        parts: of PARTS, what to do besides looking at the machine.
        only: checks of the contract; all when empty.
        streams: requests at the same time, one run for each number.
        input_tokens: of each prompt.
        output_tokens: of each output.
        rounds: requests of each stream, one after the other.
        report: file for the results.
        is_stand_in: the stand-in of a checkout's tests takes TensorRT-LLM's and the GPU's place.
    """

    model: Path | None
    section: Mapping[str, object]
    python: Path
    is_shared: bool
    parts: tuple[str, ...]
    only: tuple[str, ...]
    streams: tuple[int, ...]
    input_tokens: int
    output_tokens: int
    rounds: int
    report: Path
    is_stand_in: bool


def parser() -> argparse.ArgumentParser:
    """Describes the flags."""
    found = argparse.ArgumentParser(
        prog="make gpu-check",
        description="Checks the trtllm engine on this machine's GPU; see docs/trtllm.md.",
    )
    add = found.add_argument
    add("--model", type=Path, metavar="DIR", help="a Hugging Face model")
    add("--python", type=Path, metavar="PATH", help="that has TensorRT-LLM (worker.trtllm.python)")
    add("--config", type=Path, metavar="FILE", help="of a worker: its [worker.trtllm] is taken")
    add("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    add("--only", metavar="NAME,...", default="", help="only these checks or groups of them")
    add("--streams", default=",".join(map(str, _STREAMS)), help="numbers of streams (1,32,256)")
    add("--input-tokens", type=int, default=128, help="of each prompt (128)")
    add("--output-tokens", type=int, default=256, help="of each output (256)")
    add("--rounds", type=int, default=2, help="requests of each stream, one after the other (2)")
    add("--report", type=Path, default=Path("gpu-check.json"), help="file for the results")
    add("--stand-in", action="store_true", help=argparse.SUPPRESS)
    return found


def parse(arguments: Sequence[str]) -> Options:
    """Reads the flags.

    Raises:
        OptionError: a number, a name or a file is not usable.
    """
    found = parser().parse_args(arguments)
    section = {} if found.config is None else _section(found.config)
    python = found.python or (Path(str(section["python"])) if section.get("python") else None)
    if python is not None:
        section = {**section, "python": str(python)}
    for name in ("input_tokens", "output_tokens", "rounds"):
        if getattr(found, name) < 1:
            raise OptionError(f"--{name.replace('_', '-')} must be 1 or more")
    if found.model is not None and not (found.model / "config.json").is_file():
        raise OptionError(f"{found.model}: is no directory of a Hugging Face model: no config.json")
    return Options(
        model=None if found.model is None else found.model.resolve(),
        section=section,
        python=python or Path(sys.executable),
        is_shared=python is None,
        parts=_known("--parts", found.parts, set(PARTS)),
        only=_known("--only", found.only, known_names()),
        streams=_streams(found.streams),
        input_tokens=found.input_tokens,
        output_tokens=found.output_tokens,
        rounds=found.rounds,
        report=found.report,
        is_stand_in=found.stand_in,
    )


def _known(flag: str, text: str, known: set[str]) -> tuple[str, ...]:
    found = tuple(part for part in text.split(",") if part)
    unknown = sorted(set(found) - known)
    if unknown:
        raise OptionError(f"{flag}: there is no {', '.join(unknown)}")
    return found


def _streams(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= _STREAMS_MAX for part in parts):
        raise OptionError(f"--streams must be numbers from 1 to {_STREAMS_MAX}, as 1,32,256")
    return tuple(map(int, parts))


def _section(path: Path) -> dict[str, object]:
    """[worker.trtllm] of a worker's file, checked.

    Raises:
        OptionError: it cannot be read, or has no such section.
    """
    try:
        found: object = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} cannot be read: {error}") from None
    for name in _SECTION:
        found = found.get(name, {}) if isinstance(found, dict) else {}
    section = {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}
    try:
        TrtllmSection.model_validate(section)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("worker", "trtllm", *first["loc"])))
        raise OptionError(f"{path}: {place}: {first['msg']}") from None
    return section
