"""What `make run` was asked for: flags, and the one environment variable of make's interface."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.local.place import (
    GATEWAYS_MAX,
    OWN_MODEL,
    PORT_BASE,
    PORT_BASE_MAX,
    PORT_BASE_MIN,
    ROOT,
    SERVICES,
    STATEFUL,
    WORKERS_MAX,
    Ports,
    State,
)

ENGINES = ("llamacpp", "sim", "trtllm")
START_S = 120.0
START_ON_GPU_S = 3600.0
"""A large model is read, hashed twice, tuned and recorded before its first token."""
STEP = re.compile(r"\d+(\.\d+)?(ms|s)")
_TRUTH = ("true", "false")
SETTING = re.compile(
    r"((?P<process>[a-z]+(-\d+)?):)?(?P<name>(?P<service>[a-z]+)(\.[a-z][a-z_]*)+)=(?P<value>.+)"
)
VARIABLE = re.compile(r"(?P<process>[a-z]+(-\d+)?):(?P<name>\w+)=(?P<value>.*)")
NUMBER = re.compile(r"-?\d+(\.\d+)?")


class OptionError(Exception):
    """The user asked for something that cannot be; the text says what."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to run.

    Attributes:
        state: the state directory.
        ports: of every process.
        engine: "llamacpp", "sim" or "trtllm".
        model: the GGUF file, or the directory for trtllm; None with the simulated engine.
        capacity: streams that a worker runs at the same time; None for the engine's default.
        workers: how many.
        gateways: how many.
        settings: what is configured otherwise than the templates say, as TOML values by
            "section.key": {"gateway.replay_window": '"5s"'}; of one process only by
            "process:section.key".
        is_detached: return when ready, leave the suite running.
        ready_descriptor: file descriptor that is told when all is ready; None for none.
        environments: more variables of a process, by its name.
    """

    state: State
    ports: Ports
    engine: str
    model: Path | None
    capacity: int | None
    workers: int
    gateways: int
    settings: Mapping[str, str]
    is_detached: bool
    ready_descriptor: int | None
    environments: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)

    @property
    def start_timeout_s(self) -> float:
        """Longest time until all of it is ready."""
        return START_ON_GPU_S if self.engine == "trtllm" else START_S

    @property
    def worker_names(self) -> list[str]:
        """Names of the worker processes."""
        return [f"worker-{number}" for number in range(1, self.workers + 1)]

    @property
    def gateway_names(self) -> list[str]:
        """Names of the gateway processes."""
        return ["gateway", *(f"gateway-{number}" for number in range(2, self.gateways + 1))]


def port_base() -> Ports:
    """Reads MAAS_PORT_BASE: the only place where the environment is looked at.

    Raises:
        OptionError: it is no port, or the ports above it would not fit.
    """
    # Part of make's interface, so that `MAAS_PORT_BASE=... make run` and `make test` both work.
    text = os.environ.get("MAAS_PORT_BASE") or str(PORT_BASE)  # noqa: TID251 - the one place
    if not text.isdecimal() or not PORT_BASE_MIN <= int(text) <= PORT_BASE_MAX:
        raise OptionError(
            f"MAAS_PORT_BASE is {text!r}: must be a number, {PORT_BASE_MIN} to {PORT_BASE_MAX}"
        )
    return Ports(int(text))


def state_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --state."""
    parser.add_argument(
        "--state", type=Path, default=ROOT / ".maas", help="state directory (.maas)"
    )


def parse(arguments: Sequence[str]) -> Options:
    """Reads the flags of `python -m tools.up`.

    Raises:
        OptionError: they contradict each other, or the model's file does not exist.
    """
    parser = argparse.ArgumentParser(prog="make run", description="Runs the whole suite here.")
    parser.add_argument("--engine", choices=ENGINES, default=None)
    parser.add_argument(
        "--model",
        type=Path,
        help="a GGUF file (our own small model); with --engine trtllm a directory",
    )
    parser.add_argument("--capacity", type=int, help="streams at the same time on each worker")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument(
        "--step", metavar="TIME", help='the simulated GPU takes exactly this for a token: "20ms"'
    )
    parser.add_argument("--flat-out", action="store_true", help="the same as --step 0ms")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[PROCESS:]SECTION.KEY=VALUE",
        help="configure a service otherwise: gateway.slice_idle=5s, or one process:"
        " gateway-2:peers.billing=127.0.0.1:7000; may be repeated",
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="PROCESS:NAME=VALUE", help=argparse.SUPPRESS
    )
    parser.add_argument("--detach", action="store_true", help="return when ready")
    parser.add_argument("--ready-descriptor", type=int, help=argparse.SUPPRESS)
    state_argument(parser)
    found = parser.parse_args(arguments)
    engine = found.engine or "llamacpp"
    if engine == "sim" and found.model is not None:
        raise OptionError("a model file cannot be served by the simulated engine: drop one of them")
    if not 1 <= found.workers <= WORKERS_MAX:
        raise OptionError(f"--workers must be 1 to {WORKERS_MAX}")
    if not 1 <= found.gateways <= GATEWAYS_MAX:
        raise OptionError(f"--gateways must be 1 to {GATEWAYS_MAX}")
    if found.flat_out and found.step is not None:
        raise OptionError("--flat-out is --step 0ms: drop one of them")
    step = "0ms" if found.flat_out else found.step
    if step is not None and engine != "sim":
        raise OptionError("--step and --flat-out are for the simulated engine: add --engine sim")
    if found.capacity is not None and found.capacity < 1:
        raise OptionError("--capacity must be 1 or more")
    options = Options(
        state=State(found.state.resolve()),
        ports=port_base(),
        engine=engine,
        model=_model_of(engine, found.model),
        capacity=found.capacity,
        workers=found.workers,
        gateways=found.gateways,
        settings=_pace(step) | _settings(found.set),
        is_detached=found.detach,
        ready_descriptor=found.ready_descriptor,
        environments=_environments(found.env),
    )
    _check_processes(options)
    return options


def _check_processes(options: Options) -> None:
    """Makes sure that there is every process that --set names."""
    known = {*STATEFUL, *options.worker_names, *options.gateway_names}
    for name in options.settings:
        process, _, _ = name.rpartition(":")
        if process and process not in known:
            raise OptionError(f"--set {name}: there is no process {process}")
    for process in options.environments:
        if process not in known:
            raise OptionError(f"--env: there is no process {process}")


def _pace(step: str | None) -> dict[str, str]:
    """Settings of a simulated GPU whose every step takes the same time, whatever runs.

    Prompts are prefilled whole and at no cost, so that a lane's pace depends on nothing.
    """
    if step is None:
        return {}
    if not STEP.fullmatch(step):
        raise OptionError(f'--step is {step!r}: must be a duration, as "20ms" or "1.5s"')
    return {
        "worker.sim.prefill_tokens_per_s": "0",
        "worker.sim.prefill_chunk_tokens": "1048576",
        "worker.sim.decode_base": json.dumps(step),
        "worker.sim.decode_per_lane": '"0ms"',
    }


def _settings(texts: Sequence[str]) -> dict[str, str]:
    """Reads --set; a key that a service does not know is refused by the service."""
    found = {}
    for text in texts:
        match = SETTING.fullmatch(text)
        if match is None or not (match["process"] or match["service"] in SERVICES):
            raise OptionError(
                f"--set {text}: must be [PROCESS:]SECTION.KEY=VALUE, and without a process SECTION"
                " is that of a service, or a section inside of it"
            )
        value = match["value"]
        is_bare = NUMBER.fullmatch(value) or value in _TRUTH
        name = text.partition("=")[0]
        found[name] = value if is_bare else json.dumps(value)
    return found


def _environments(texts: Sequence[str]) -> dict[str, dict[str, str]]:
    """Reads --env."""
    found: dict[str, dict[str, str]] = {}
    for text in texts:
        match = VARIABLE.fullmatch(text)
        if match is None:
            raise OptionError(f"--env {text}: must be PROCESS:NAME=VALUE")
        found.setdefault(match["process"], {})[match["name"]] = match["value"]
    return found


def _model_of(engine: str, asked: Path | None) -> Path | None:
    if engine == "sim":
        return None
    if engine == "trtllm":
        return _model_directory(asked)
    return _model_file(asked)


def _model_directory(asked: Path | None) -> Path:
    if asked is None:
        raise OptionError("ENGINE=trtllm needs MODEL=<directory of a Hugging Face model>")
    path = asked.expanduser().resolve()
    if not (path / "config.json").is_file():
        raise OptionError(f"{path}: is no directory of a Hugging Face model: no config.json")
    return path


def _model_file(asked: Path | None) -> Path:
    path = (asked or OWN_MODEL).expanduser().resolve()
    if path.is_file():
        return path
    if asked is None:
        raise OptionError(f"{path} is missing; run with ENGINE=sim, or MODEL=<file.gguf>")
    raise OptionError(f"{path}: there is no such model file")
