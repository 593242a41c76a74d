"""What the environment says about this stand-in: its version, its speed, its faults.

The variable MAAS_STANDIN_TRTLLM holds a JSON object; tests/standins/README.md lists its faults.
What is not known is refused, so that no test asks for a fault that does not come.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

VARIABLE = "MAAS_STANDIN_TRTLLM"

Scalar = str | int | float | bool | None
Value = Scalar | list[str]

TRIGGERS = frozenset({"request", "every", "tokens", "after_s", "when_file"})
# Parameters of each fault besides its triggers.
FAULTS: dict[str, frozenset[str]] = {
    "load_error": frozenset({"message"}),
    "load_hang": frozenset(),
    "load_killed": frozenset(),
    "call_error": frozenset({"type"}),
    "call_slow": frozenset({"s"}),
    "request_error": frozenset({"message"}),
    "hang": frozenset(),
    "finish_reason": frozenset({"reason"}),
    "eos_missing": frozenset(),
    "logprobs_flat": frozenset(),
    "logprobs_longer": frozenset(),
    "logprobs_missing": frozenset(),
    "abort_ignored": frozenset(),
    "wedge_after_aborts": frozenset({"aborts"}),
    "wedge": frozenset({"s"}),
    "rank_killed": frozenset(),
    "fatal": frozenset({"message", "blocks_s"}),
    "process_killed": frozenset(),
    "stats_none": frozenset(),
    "stats_null_kv": frozenset(),
    "stats_missing": frozenset({"keys"}),
    "stats_error": frozenset(),
    "stats_block": frozenset({"s"}),
    "events_gap": frozenset({"event"}),
    "events_windows": frozenset({"window"}),
    "unhealthy": frozenset(),
    "shutdown_hang": frozenset(),
    "shutdown_error": frozenset(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        name: one of FAULTS.
        request: of which call of generate_async, counted from 1; None for none in particular.
        every: of every call.
        tokens: not before the request has so many output tokens.
        after_s: not before the engine has been loaded for so long.
        when_file: not before this file exists.
        parameters: what is particular to this fault.
    """

    name: str
    request: int | None = None
    every: bool = False
    tokens: int = 0
    after_s: float = 0.0
    when_file: Path | None = None
    parameters: dict[str, Value] = field(default_factory=dict)

    def concerns(self, number: int) -> bool:
        """Whether it is a fault of the n-th request."""
        return self.every or self.request == number

    def text(self, name: str, default: str) -> str:
        """A parameter that is a text."""
        value = self.parameters.get(name, default)
        return value if isinstance(value, str) else default

    def number(self, name: str, default: float | None) -> float | None:
        """A parameter that is a number; None stands for no end."""
        value = self.parameters.get(name, default)
        return value if isinstance(value, int | float) else None

    def texts(self, name: str) -> list[str]:
        """A parameter that is a list of texts."""
        value = self.parameters.get(name)
        return value if isinstance(value, list) else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a test has asked for.

    Attributes:
        version: of TensorRT-LLM; decides which surface there is.
        step_s: duration of one iteration of the engine; 0 means as fast as its consumer reads.
        load_s: duration of the constructor.
        gpus: visible devices.
        kv_blocks: blocks of the KV cache where kv_cache_config says no number of tokens.
        detect: whether there is what only newer documentation mentions; None goes by the version.
        features: differences between versions, switched on or off by name.
        draws: "request": the n-th draw of a request is a function of (seed, n), as a generator for
            each request does it. "position": of (seed, place in prompt and output).
        dead_after_s: until a version that notices a dead rank notices it.
        banner: whether importing it prints its version, as the real one does.
        hang_s: for how long what hangs for ever hangs; for tests that hang inside their own
            process. None means for ever.
        faults: what goes wrong.
    """

    version: str = "1.2.1"
    step_s: float = 0.0
    load_s: float = 0.0
    gpus: int = 8
    kv_blocks: int = 1024
    detect: bool | None = None
    features: dict[str, bool] = field(default_factory=dict)
    draws: str = "request"
    dead_after_s: float = 3.0
    banner: bool = True
    hang_s: float | None = None
    faults: tuple[Fault, ...] = ()

    def named(self, name: str) -> list[Fault]:
        """The faults of one name."""
        return [fault for fault in self.faults if fault.name == name]

    def fault_of(self, name: str, number: int) -> Fault | None:
        """The fault of one name that the n-th request has."""
        return next((fault for fault in self.named(name) if fault.concerns(number)), None)


def read() -> Settings:
    """Reads the environment.

    Raises:
        ValueError: a key, a fault or a parameter is not known.
    """
    text = os.environ.get(VARIABLE, "{}")  # noqa: TID251 - the one way into a child process
    given = json.loads(text)
    if not isinstance(given, dict):
        raise ValueError(f"{VARIABLE} must hold a JSON object")  # noqa: TRY004 - of the text
    unknown = set(given) - set(Settings.__dataclass_fields__)
    if unknown:
        raise ValueError(f"{VARIABLE}: unknown keys {sorted(unknown)}")
    faults = tuple(_fault(entry) for entry in given.pop("faults", []))
    return Settings(faults=faults, **given)


def _fault(entry: dict[str, Value]) -> Fault:
    name = str(entry.get("name"))
    if name not in FAULTS:
        raise ValueError(f"{VARIABLE}: there is no fault {name!r}; there are {sorted(FAULTS)}")
    unknown = set(entry) - {"name"} - TRIGGERS - FAULTS[name]
    if unknown:
        raise ValueError(f"{VARIABLE}: fault {name!r} has no {sorted(unknown)}")
    request, file = entry.get("request"), entry.get("when_file")
    tokens, after_s = entry.get("tokens", 0), entry.get("after_s", 0.0)
    return Fault(
        name=name,
        request=request if isinstance(request, int) else None,
        every=bool(entry.get("every", False)),
        tokens=tokens if isinstance(tokens, int) else 0,
        after_s=after_s if isinstance(after_s, int | float) else 0.0,
        when_file=Path(file) if isinstance(file, str) else None,
        parameters={key: entry[key] for key in FAULTS[name] & set(entry)},
    )
