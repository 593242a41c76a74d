"""What the worker tells the child of the trtllm engine at its start, read on the child's side.

The child's Python need not have pydantic, with which the worker has checked all of it: here it is
only taken apart. [worker.trtllm] and its keys are explained in services/worker/trtllm_config.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.worker.engine.base import EngineStartError
from services.worker.engine.wire_facts import Setting


@dataclass(frozen=True, slots=True)
class Values:
    """One section of the configuration. What is missing, or of another type, is a bug.

    Attributes:
        name: of the section, below [worker.trtllm].
        values: by key.
    """

    name: str
    values: Mapping[str, Setting]

    def flag(self, key: str) -> bool:
        """Returns a switch."""
        return bool(self._get(key, bool))

    def integer(self, key: str) -> int:
        """Returns a whole number."""
        value = self._get(key, int)
        assert isinstance(value, int)
        return value

    def number(self, key: str) -> float:
        """Returns a number; durations are in seconds."""
        value = self._get(key, int, float)
        assert isinstance(value, int | float)
        return float(value)

    def text(self, key: str) -> str:
        """Returns a text."""
        return str(self._get(key, str))

    def integer_or_none(self, key: str) -> int | None:
        """Returns a whole number, or None where nothing is said."""
        return self.integer(key) if self.is_set(key) else None

    def flag_or_none(self, key: str) -> bool | None:
        """Returns a switch, or None where nothing is said."""
        return self.flag(key) if self.is_set(key) else None

    def text_or_none(self, key: str) -> str | None:
        """Returns a text, or None where nothing is said."""
        return self.text(key) if self.is_set(key) else None

    def integers(self, key: str) -> list[int]:
        """Returns whole numbers."""
        return [item for item in self._list(key) if isinstance(item, int)]

    def texts(self, key: str) -> list[str]:
        """Returns texts."""
        return [item for item in self._list(key) if isinstance(item, str)]

    def is_set(self, key: str) -> bool:
        """Whether something is said."""
        return self.values.get(key) is not None

    def _list(self, key: str) -> Sequence[Setting]:
        value = self._get(key, list)
        assert isinstance(value, list)
        return value

    def _get(self, key: str, *kinds: type) -> Setting:
        value = self.values.get(key)
        # True is an int to Python, and 1 to whoever meant a number.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise _unreadable(f"trtllm.{self.name}.{key}")
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class TrtllmSettings:
    """All of it.

    Attributes:
        model_path: directory of the model.
        capacity: requests in the batch at the same time.
        context_length: prompt and output together, tokens; None for the model's own.
        expected_digest: "sha256:<hex>" that the model has to have; None when nothing is expected.
        section: [worker.trtllm].
    """

    model_path: Path
    capacity: int
    context_length: int | None
    expected_digest: str | None
    section: Mapping[str, Setting]

    def values(self, name: str) -> Values:
        """Returns a section below [worker.trtllm].

        Raises:
            EngineStartError: it is not there.
        """
        values = self.section.get(name)
        if not isinstance(values, Mapping):
            raise _unreadable(f"trtllm.{name}")
        return Values(name, values)


def read_settings(settings: Mapping[str, Setting]) -> TrtllmSettings:
    """Reads what a START frame brought.

    Raises:
        EngineStartError: it is not what this version of the worker sends.
    """
    top = Values("", settings)
    section = settings.get("trtllm")
    if not isinstance(section, Mapping):
        raise _unreadable("trtllm")
    return TrtllmSettings(
        model_path=Path(top.text("model_path")),
        capacity=top.integer("capacity"),
        context_length=top.integer_or_none("context_length"),
        expected_digest=top.text_or_none("expected_digest"),
        section=section,
    )


def _unreadable(key: str) -> EngineStartError:
    return EngineStartError(
        f"the engine cannot read {key} of what the worker told it: its files changed since this "
        "worker started: restart it"
    )
