"""The results in a file that can be sent: no prompt, no output, no key, no path, no host name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.conformance.verdict import Verdict, summary
from tools.gpu_check.machine import Machine
from tools.gpu_check.workload import Run


@dataclass(slots=True)
class Results:
    """What a run has found so far.

    Attributes:
        machine: what there is.
        model: what kind of model it was: architecture and size, not its name.
        verdicts: of the contract.
        bare: runs on the bare LLM API.
        suite: the same through the suite.
        missing: what could not be shown, and why.
    """

    machine: Machine
    model: dict[str, object] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    bare: list[Run] = field(default_factory=list)
    suite: list[Run] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def failures(self) -> int:
        """Checks that failed, and requests."""
        refuted = sum(verdict.kind.value == "FAIL" for verdict in self.verdicts)
        return refuted + sum(sum(run.failures.values()) for run in (*self.bare, *self.suite))


_MODEL_FACTS = (
    "architectures",
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "torch_dtype",
    "dtype",
    "quantization_config",
)


def model_facts(directory: Path) -> dict[str, object]:
    """What config.json says of the kind of model."""
    try:
        found = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: found[name] for name in _MODEL_FACTS if name in found}


def write(path: Path, results: Results, private: Mapping[str, str]) -> None:
    """Writes the file.

    Args:
        path: of the file.
        results: to write.
        private: paths that messages may hold, and what is written in their place.

    Raises:
        OSError: it cannot be written.
    """
    machine = dataclasses.asdict(results.machine)
    content = {
        "machine": machine,
        "model": results.model,
        "contract": {
            "summary": summary(results.verdicts),
            "checks": [
                {"kind": verdict.kind.value, "check": verdict.feature, "text": verdict.text}
                for verdict in results.verdicts
            ],
        },
        "throughput": {
            "bare": [dataclasses.asdict(run) for run in results.bare],
            "suite": [dataclasses.asdict(run) for run in results.suite],
        },
        "not shown": results.missing,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False)
    # The longest first: one may stand inside another.
    for place in sorted(private, key=len, reverse=True):
        text = text.replace(json.dumps(place, ensure_ascii=False)[1:-1], private[place])
    path.write_text(f"{text}\n", encoding="utf-8")


def how_to_report(path: Path, results: Results) -> Sequence[str]:
    """What an operator does with it."""
    lines = [f"All results are in {path}: no prompt, output, key, path or host name is in it."]
    if results.failures:
        lines += [
            "Something is not as promised. Please open an issue with that file, say which line of",
            "the output surprised you, and add the worker's log of the same minutes if you can",
            "(logs hold no prompts either). To look at one check again:",
            '    make gpu-check MODEL=... ARGS="--parts contract --only <name of the check>"',
        ]
    elif results.suite:
        lines.append("A ratio that is lower than you expect is worth an issue with that file, too.")
    return lines
