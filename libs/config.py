"""Configuration: one TOML file for each process, read once, strict, frozen.

Unknown keys are errors. Durations are written "250ms", "10s", "5m"; secrets are paths of files.
No environment variables.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Self, TypeVar

import pydantic

from libs.failpoints import Rule

_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def _parse_duration(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError('a duration is a text with a unit, as "250ms", "10s" or "5m"')  # noqa: TRY004 - pydantic wants ValueError
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)", value)
    if match is None:
        raise ValueError('a duration is a number and a unit, as "250ms", "10s" or "5m"')
    return float(match[1]) * _UNITS_S[match[2]]


Seconds = Annotated[float, pydantic.BeforeValidator(_parse_duration)]
"""A duration in seconds, written with its unit."""

Address = Annotated[str, pydantic.StringConstraints(pattern=r"^[^\s:]+:\d{1,5}$")]
"""host:port"""


class Section(pydantic.BaseModel):
    """Base of every part of a configuration: frozen, and unknown keys are errors."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class ServerSection(Section):
    """Where the process listens.

    Attributes:
        listen: host:port of the gRPC server.
        metrics_listen: host:port of the Prometheus page; loopback, as it is open to everybody.
        drain_grace: how long running calls may go on after SIGTERM.
    """

    listen: Address
    metrics_listen: Address
    drain_grace: Seconds = 10.0


class LogSection(Section):
    """What is logged.

    Attributes:
        level: "debug", "info", "warning" or "error".
    """

    level: str = pydantic.Field(default="info", pattern="^(debug|info|warning|error)$")


class IdentitySection(Section):
    """Who this process is to other services, and which of them it lets in.

    Attributes:
        name: name of the service.
        token_file: file with the token that it shows to others.
        callers: for each service that may call, the file with the SHA-256 of its token (hex).
        allow: for each internal method ("package.Service/Method"), the services that may call it.
    """

    name: str
    token_file: Path
    callers: dict[str, Path] = {}
    allow: dict[str, list[str]] = {}


class AuthSection(Section):
    """Where the table of API keys comes from.

    Attributes:
        endpoint: host:port of the auth service.
    """

    endpoint: Address


class PostgresSection(Section):
    """The database of a service.

    Attributes:
        dsn: postgresql:// URL without a password.
        password_file: file with the password; absent when the server needs none.
        connections_max: size of the pool.
        statement_timeout: longest time that one statement may take.
    """

    dsn: str
    password_file: Path | None = None
    connections_max: int = pydantic.Field(default=8, ge=1, le=100)
    statement_timeout: Seconds = 5.0


class FailpointsSection(Section):
    """Where the process is to die, for campaigns that show what survives (libs/failpoints.py).

    Attributes:
        allow: the process may start with points; never in production.
        points: rules, as "journal.opened=kill@3".
        marks: folder in which each rule notes that it has acted, so that it acts once over all
            lives of the process.
    """

    allow: bool = False
    points: list[str] = []
    marks: Path | None = None

    @pydantic.field_validator("points")
    @classmethod
    def _check_points(cls, points: list[str]) -> list[str]:
        # BadRule is a ValueError, which pydantic reports with the key's path.
        for text in points:
            Rule.parse(text)
        return points

    @pydantic.model_validator(mode="after")
    def _check_allowed(self) -> Self:
        if self.points and not self.allow:
            raise ValueError("points are for tests only and need allow = true")
        return self

    def rules(self) -> list[Rule]:
        """The rules."""
        return [Rule.parse(text) for text in self.points]


class ServiceConfig(Section):
    """What every process has.

    Attributes:
        server: where it listens.
        log: what it logs.
        identity: who it is to others.
        failpoints: where it is to die; nowhere, outside of tests.
    """

    server: ServerSection
    log: LogSection = LogSection()
    identity: IdentitySection
    failpoints: FailpointsSection = FailpointsSection()


class ConfigError(Exception):
    """The configuration is wrong; the message lists file, keys and reasons."""


ConfigT = TypeVar("ConfigT", bound=Section)


def load(kind: type[ConfigT], path: Path) -> ConfigT:
    """Reads and checks a file.

    Raises:
        ConfigError: the file is missing, is no TOML, or has wrong keys or values.
    """
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    try:
        return kind.model_validate(values)
    except pydantic.ValidationError as error:
        lines = [
            f"{path}: {'.'.join(str(part) for part in item['loc'])}: {item['msg']}"
            for item in error.errors(include_input=False)
        ]
        raise ConfigError("\n".join(lines)) from error


def read_secret(path: Path) -> str:
    """Reads a secret, without its last line end.

    Raises:
        ConfigError: the file cannot be read or is empty.
    """
    try:
        secret = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not secret:
        raise ConfigError(f"{path}: is empty")
    return secret
