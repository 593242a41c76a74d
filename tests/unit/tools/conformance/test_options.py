"""tools/conformance/options.py: what a run can be asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.conformance.deployment import shell_action
from tools.conformance.options import OptionError, parse
from tools.conformance.verdict import CannotShow


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text("mk_1\n")
    return path


def test_without_an_endpoint_the_kit_brings_its_own_suite() -> None:
    got = parse(["--group", "stream", "--only", "U3,W-1"])

    assert (got.deployment, got.only) == (None, ("U3", "W-1"))


def test_foreign_deployment_is_described_by_flags(key_file: Path) -> None:
    flags = ["--endpoint", "host:1", "--model", "m", "--api-key-file", str(key_file)]
    flags += ["--scheduler", "host:2", "--stall-limit", "5", "--ca", str(key_file)]

    place = parse(["--group", "stream", *flags]).deployment

    assert place is not None
    assert (place.endpoint, place.api_key, place.scheduler) == ("host:1", "mk_1", "host:2")
    assert (place.stall_limit_s, place.replay_window_s) == (5.0, 60.0)
    assert place.certificates == b"mk_1\n"
    assert (place.admin_key, place.kill, place.drain) == (None, None, None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only", "X-1"], "no feature X-1"),
        (["--billing", "host:1"], "add --endpoint"),
        (["--endpoint", "host:1"], "--model and --api-key-file"),
        (["--endpoint", "host:1", "--model", "m", "--api-key-file", "/nowhere"], "/nowhere"),
        (["--endpoint", "host", "--model", "m", "--api-key-file", "/x"], "HOST:PORT"),
        (
            ["--endpoint", "h:1", "--model", "m", "--api-key-file", "/x", "--stall-limit", "0"],
            "above 0",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(flags: list[str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        parse(["--group", "stream", *flags])


def test_engines_are_looked_at_alone() -> None:
    got = parse(["--group", "engine", "--only", "stops,nothing_comes_behind_the_end"])
    one = parse(["--group", "engine", "--engine", "trtllm"])

    assert got.engines == ("sim", "llamacpp", "trtllm")
    assert got.only == ("stops", "nothing_comes_behind_the_end")
    assert (one.engines, one.only, one.deployment) == (("trtllm",), (), None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--group", "engine", "--only", "U3"], "no check U3; there are the groups life"),
        (["--group", "engine", "--endpoint", "host:1"], "drop --endpoint"),
        (["--group", "engine", "--billing", "host:1"], "add --endpoint"),
    ],
)
def test_what_engines_alone_do_not_need_is_refused(flags: list[str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        parse(flags)


def test_empty_key_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()

    with pytest.raises(OptionError, match="is empty"):
        parse(
            ["--group", "stream", "--endpoint", "h:1", "--model", "m", "--api-key-file", str(path)]
        )


async def test_command_gets_the_id_of_the_worker(tmp_path: Path) -> None:
    target = tmp_path / "told"

    await shell_action(f"printf %s {{worker}} > {target}")("workers/w 1")

    assert target.read_text() == "w 1"


async def test_command_that_fails_shows_nothing() -> None:
    with pytest.raises(CannotShow, match="exit code 3"):
        await shell_action("exit 3")("workers/w1")
