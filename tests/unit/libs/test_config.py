"""libs/config.py: strict files."""

from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

from libs.config import (
    ConfigError,
    PostgresSection,
    Seconds,
    Section,
    ServiceConfig,
    load,
    read_secret,
)

GOOD = """
[server]
listen = "127.0.0.1:50051"
metrics_listen = "127.0.0.1:51051"
drain_grace = "1.5s"

[identity]
name = "catalog"
token_file = "/secrets/catalog.token"
"""


class Times(Section):
    """One duration."""

    after: Seconds


def written(folder: Path, text: str) -> Path:
    path = folder / "service.toml"
    path.write_text(text)
    return path


def test_good_file_is_read(tmp_path: Path) -> None:
    config = load(ServiceConfig, written(tmp_path, GOOD))

    assert config.server.drain_grace == 1.5
    assert config.log.level == "info"
    assert config.identity.token_file == Path("/secrets/catalog.token")
    assert (config.identity.callers, config.identity.allow) == ({}, {})


def test_configuration_is_frozen(tmp_path: Path) -> None:
    config = load(ServiceConfig, written(tmp_path, GOOD))

    with pytest.raises(pydantic.ValidationError):
        config.server.listen = "other:1"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("drain_grace", "drain_grase"), "server.drain_grase"),
        (("[identity]", "[identty]"), "identty"),
        (('"1.5s"', "1.5"), "server.drain_grace"),
        (('"1.5s"', '"1.5"'), "server.drain_grace"),
        (('"1.5s"', '"1.5 s"'), "server.drain_grace"),
        (('"1.5s"', '"-1s"'), "server.drain_grace"),
        (("127.0.0.1:50051", "127.0.0.1"), "server.listen"),
        (('name = "catalog"', ""), "identity.name"),
        (("[server]", "[server"), "service.toml"),
    ],
)
def test_mistake_stops_the_start_and_is_named(
    tmp_path: Path, change: tuple[str, str], complaint: str
) -> None:
    path = written(tmp_path, GOOD.replace(*change))

    with pytest.raises(ConfigError) as caught:
        load(ServiceConfig, path)

    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)


def test_every_mistake_is_listed_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD.replace("drain_grace", "a").replace("name", "b"))

    with pytest.raises(ConfigError) as caught:
        load(ServiceConfig, path)

    assert len(str(caught.value).splitlines()) == 3


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml"):
        load(ServiceConfig, tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "want"), [("250ms", 0.25), ("10s", 10), ("5m", 300), ("2h", 7200), ("0s", 0)]
)
def test_durations_carry_their_unit(text: str, want: float) -> None:
    assert Times.model_validate({"after": text}).after == pytest.approx(want)


@pytest.mark.parametrize("text", ["", "s", "1", "1d", "1e3s", "1s ", "٣s1"])
def test_text_that_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(pydantic.ValidationError):
        Times.model_validate({"after": text})


def test_values_are_not_repeated_in_complaints(tmp_path: Path) -> None:
    path = written(tmp_path, '[server]\nlisten = "hunter2"\n')

    with pytest.raises(ConfigError) as caught:
        load(ServiceConfig, path)

    assert "hunter2" not in str(caught.value)


def test_pool_is_bounded() -> None:
    with pytest.raises(pydantic.ValidationError):
        PostgresSection(dsn="postgresql:///x", connections_max=0)


def test_secret_is_read_without_its_line_end(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("hunter2\n")

    assert read_secret(path) == "hunter2"


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff"])
def test_bad_secret_is_refused_without_being_shown(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)

    with pytest.raises(ConfigError) as caught:
        read_secret(path)

    assert str(path) in str(caught.value)


def test_missing_secret_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        read_secret(tmp_path / "none")
