"""signatures.json: which names, types and defaults a version of TensorRT-LLM has.

Types are written as in Python. They are checked strictly: a bool is no int, an int of numpy is no
int, a tuple is no list; an int is a float.
"""

# ruff: noqa: TID252 - it is imported as tensorrt_llm, and known to mypy as a part of tests

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Union, cast

import pydantic

from .settings import Settings

STRICT = pydantic.ConfigDict(strict=True, arbitrary_types_allowed=True)
_SOURCE = Path(__file__).parents[1] / "signatures.json"
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)(?:rc(\d+))?")
_FINAL = 10_000
_PRIMITIVES: dict[str, object] = {
    "None": None,
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "object": object,
    "Path": Path,
}

Table = Mapping[str, "Entry"]
Make = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter or field.

    Attributes:
        type: as Python writes it.
        required: it has no default.
        default: a JSON value, or the name of something that is made: "KvCacheConfig()".
    """

    type: str
    required: bool
    default: object


@dataclass
class Surface:
    """What one version offers.

    Attributes:
        settings: of the environment.
        names: classes by the names that types use; whoever makes one adds it.
    """

    settings: Settings
    names: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._source = cast("dict[str, object]", json.loads(_SOURCE.read_text(encoding="utf-8")))
        self._version = version_key(self.settings.version)
        self._is_new = self._version >= version_key("1.3.0rc1")
        self._checks: dict[str, pydantic.TypeAdapter[object]] = {}

    def section(self, name: str) -> object:
        """A section as it stands in the file."""
        return self._source[name]

    def table(self, name: str) -> dict[str, Entry]:
        """Parameters or fields of this version, in order."""
        rows = cast("dict[str, dict[str, object]]", self._source[name])
        return {
            key: Entry(str(row["type"]), bool(row.get("required")), row.get("default"))
            for key, row in rows.items()
            if self._has(row)
        }

    def has(self, feature: str) -> bool:
        """Whether a difference between versions is there."""
        given = self.settings.features.get(feature)
        if given is not None:
            return given
        features = cast("dict[str, dict[str, str]]", self._source["features"])
        return self.is_since(features[feature]["since"])

    def is_since(self, version: str) -> bool:
        """Whether this version is that one or a later one."""
        return self._version >= version_key(version)

    def _has(self, row: dict[str, object]) -> bool:
        since = row.get("since")
        if isinstance(since, str):
            return self.is_since(since)
        if row["confidence"] == "detect":
            detect = self.settings.detect
            return self._is_new if detect is None else detect
        return row["confidence"] != "new" or self._is_new

    def check(self, what: str, text: str, value: object) -> None:
        """Refuses a value of another type.

        Raises:
            TypeError: it is.
        """
        adapter = self._checks.get(text)
        if adapter is None:
            adapter = pydantic.TypeAdapter(cast("type[object]", self.type_of(text)), config=STRICT)
            self._checks[text] = adapter
        try:
            adapter.validate_python(value)
        except pydantic.ValidationError:
            kind = type(value).__name__
            raise TypeError(f"{what} must be {text}, not {kind}") from None

    def type_of(self, text: str) -> object:
        """The type that a text names.

        Raises:
            KeyError: it names a class that nobody has made.
        """
        options = [self._simple(part) for part in _split(text, "|")]
        return options[0] if len(options) == 1 else Union[tuple(options)]  # noqa: UP007

    def _simple(self, text: str) -> object:
        if text in _PRIMITIVES:
            return _PRIMITIVES[text]
        if text.startswith("'"):
            return Literal[text.strip("'")]
        head, bracket, rest = text.partition("[")
        if bracket:
            inner = [self.type_of(part) for part in _split(rest[:-1], ",")]
            return _GENERICS[head](inner)
        if text == "Tensor":
            return Annotated[object, pydantic.AfterValidator(_tensor)]
        return _instance_of(self.names[text])

    def make_default(self, entry: Entry) -> Make:
        """What makes a default anew."""
        default = entry.default
        if isinstance(default, str) and default.endswith("()"):
            return cast("Make", self.names[default[:-2]])
        if isinstance(default, str) and default.partition(".")[0] in self.names:
            owner, _, member = default.partition(".")
            value: object = getattr(self.names[owner], member)
            return lambda: value
        named = self.names.get(entry.type)
        if isinstance(default, str) and isinstance(named, type):
            value = named(default)
            return lambda: value
        if isinstance(default, list):
            return lambda: list(default)
        if isinstance(default, dict):
            return lambda: dict(default)
        return lambda: default

    def signature(self, table: Table, *, extra: bool = False) -> inspect.Signature:
        """What inspect.signature says about a method with these parameters."""
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter("self", kind)]
        for name, entry in table.items():
            default = inspect.Parameter.empty if entry.required else self.make_default(entry)()
            parameters.append(inspect.Parameter(name, kind, default=default, annotation=entry.type))
        if extra:
            parameters.append(inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD))
        return inspect.Signature(parameters)


def version_key(text: str) -> tuple[int, int, int, int]:
    """A version that can be compared; a release stands behind its candidates.

    Raises:
        ValueError: it is no version.
    """
    found = _VERSION.match(text)
    if found is None:
        raise ValueError(f"{text!r} is no version of TensorRT-LLM")
    major, minor, patch, candidate = found.groups()
    return int(major), int(minor), int(patch), _FINAL if candidate is None else int(candidate)


def _split(text: str, separator: str) -> list[str]:
    """Splits outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _instance_of(found: object) -> object:
    return Annotated[object, pydantic.AfterValidator(_instance_check(cast("type", found)))]


def _instance_check(wanted: type) -> Callable[[object], object]:
    def check(value: object) -> object:
        if not isinstance(value, wanted):
            raise ValueError(f"no {wanted.__name__}")  # noqa: TRY004 - pydantic asks for it
        return value

    return check


def _tensor(value: object) -> object:
    kind = type(value)
    if kind.__name__ != "Tensor" or kind.__module__.partition(".")[0] != "torch":
        raise ValueError("no tensor")
    return value


_GENERICS: dict[str, Callable[[list[object]], object]] = {
    "list": lambda inner: list[inner[0]],  # type: ignore[valid-type]
    "set": lambda inner: set[inner[0]],  # type: ignore[valid-type]
    "dict": lambda inner: dict[inner[0], inner[1]],  # type: ignore[valid-type]
    "Mapping": lambda inner: dict[inner[0], inner[1]],  # type: ignore[valid-type]
}
