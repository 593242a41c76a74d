"""Fail-points: what acts, when, and that nothing does unless it is asked for."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from libs import failpoints
from libs.config import ConfigError, ServiceConfig, load
from libs.errors import Unavailable
from libs.failpoints import Action, BadRule, Point, Rule

CONFIG = """
[server]
listen = "127.0.0.1:1"
metrics_listen = "127.0.0.1:2"

[identity]
name = "tried"
token_file = "token"
"""
PROGRAM = """
import sys
from pathlib import Path
from libs import failpoints

failpoints.arm([failpoints.Rule.parse(sys.argv[1])], Path(sys.argv[2]))
for _ in range(3):
    failpoints.hit(failpoints.Point.JOURNAL_OPENED)
    print("passed", flush=True)
"""


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm([], None)


def error_at(time: int) -> Rule:
    return Rule(Point.JOURNAL_OPENED, Action.ERROR, time)


def test_rule_is_read_and_written() -> None:
    rule = Rule.parse("journal.opened=kill@3")

    assert rule == Rule(Point.JOURNAL_OPENED, Action.KILL, 3)
    assert str(rule) == "journal.opened=kill@3"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "journal.opened",
        "journal.opened=kill",
        "journal.opened=kill@0",
        "journal.opened=kill@-1",
        "journal.opened=explode@1",
        "journal.nowhere=kill@1",
        "journal.opened=kill@1 ",
    ],
)
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(BadRule):
        Rule.parse(text)


def test_points_without_rules_do_nothing() -> None:
    for point in Point:
        failpoints.hit(point)


def test_rule_acts_at_its_passage_only() -> None:
    failpoints.arm([error_at(2)], None)

    failpoints.hit(Point.JOURNAL_OPENED)
    failpoints.hit(Point.JOURNAL_CLOSED)
    with pytest.raises(Unavailable, match=r"journal\.opened"):
        failpoints.hit(Point.JOURNAL_OPENED)
    failpoints.hit(Point.JOURNAL_OPENED)


def test_rule_with_marks_acts_in_one_life_only(tmp_path: Path) -> None:
    failpoints.arm([error_at(1)], tmp_path)
    with pytest.raises(Unavailable):
        failpoints.hit(Point.JOURNAL_OPENED)

    failpoints.arm([error_at(1)], tmp_path)
    failpoints.hit(Point.JOURNAL_OPENED)

    assert [path.name for path in tmp_path.iterdir()] == [str(error_at(1))]


def test_rule_of_two_processes_acts_in_the_first_only(tmp_path: Path) -> None:
    failpoints.arm([error_at(1)], tmp_path)
    (tmp_path / str(error_at(1))).touch()

    failpoints.hit(Point.JOURNAL_OPENED)


def test_killed_process_has_gone_no_further(tmp_path: Path) -> None:
    rule = "journal.opened=kill@2"
    command = [sys.executable, "-c", PROGRAM, rule, str(tmp_path)]

    first = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)

    assert first.returncode == -signal.SIGKILL
    assert first.stdout == "passed\n"
    assert first.stderr == f"failpoint {rule}\n"
    assert (second.returncode, second.stdout) == (0, "passed\n" * 3)


def load_text(tmp_path: Path, text: str) -> ServiceConfig:
    file = tmp_path / "service.toml"
    file.write_text(CONFIG + text)
    return load(ServiceConfig, file)


def test_configuration_has_no_points_by_itself(tmp_path: Path) -> None:
    assert load_text(tmp_path, "").failpoints.rules() == []


def test_configured_points_are_rules(tmp_path: Path) -> None:
    text = '[failpoints]\nallow = true\npoints = ["slice.noted=stop@7"]\n'

    rules = load_text(tmp_path, text).failpoints.rules()

    assert rules == [Rule(Point.SLICE_NOTED, Action.STOP, 7)]


@pytest.mark.parametrize(
    "text",
    [
        '[failpoints]\npoints = ["slice.noted=kill@1"]\n',
        '[failpoints]\nallow = true\npoints = ["slice.nowhere=kill@1"]\n',
    ],
)
def test_points_are_refused_where_they_are_not_allowed_or_unknown(
    tmp_path: Path, text: str
) -> None:
    with pytest.raises(ConfigError, match="failpoints"):
        load_text(tmp_path, text)
