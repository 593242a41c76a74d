"""tools/local/child.py, leash.py and orphan.py with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tools.local import orphan
from tools.local.child import Log

STAND_IN = Path(__file__).with_name("stand_in.py")
TIMEOUT_S = 10.0


def eventually(check: Callable[[], bool]) -> None:
    """Waits until something has become true."""
    give_up_at = time.perf_counter() + TIMEOUT_S
    while not check():
        assert time.perf_counter() < give_up_at, "it never happened"
        time.sleep(0.01)


def pids(folder: Path, name: str) -> list[int]:
    return [int(path.suffix[1:]) for path in folder.glob(f"{name}.*") if path.suffix != ".log"]


def is_alive(pid: int) -> bool:
    found = orphan.find(pid)
    return found is not None and found.state != "Z"


class Driver:
    """The supervisor process of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def start(self, *names: str) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            [sys.executable, str(STAND_IN), str(self.folder), *names],
            stdout=subprocess.PIPE,
            text=True,
        )
        return self.process

    def start_all(self, *names: str) -> subprocess.Popen[str]:
        process = self.start(*names)
        eventually((self.folder / "all-ready").exists)
        return process

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        # These have no leash: it is their parent's supervisor that ends them.
        for pid in pids(self.folder, "grandchild"):
            orphan.kill(pid)


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    found = Driver(tmp_path)
    yield found
    found.close()


def test_killed_child_is_started_again(driver: Driver, tmp_path: Path) -> None:
    driver.start_all("steady")
    (first,) = pids(tmp_path, "steady")

    os.kill(first, signal.SIGKILL)

    eventually(lambda: len(pids(tmp_path, "steady")) == 2)
    (second,) = set(pids(tmp_path, "steady")) - {first}
    assert is_alive(second)


def test_what_a_killed_child_leaves_behind_is_ended(driver: Driver, tmp_path: Path) -> None:
    """Its process group, and a process that went off into a session of its own."""
    driver.start_all("parent")
    left = pids(tmp_path, "grandchild")
    assert [is_alive(pid) for pid in left] == [True, True]

    os.kill(pids(tmp_path, "parent")[0], signal.SIGKILL)

    eventually(lambda: not any(is_alive(pid) for pid in left))
    eventually(lambda: len(pids(tmp_path, "parent")) == 2)


def test_children_do_not_outlive_their_supervisor(driver: Driver, tmp_path: Path) -> None:
    process = driver.start_all("steady", "stubborn")
    children = pids(tmp_path, "steady") + pids(tmp_path, "stubborn")

    process.kill()

    eventually(lambda: not any(is_alive(pid) for pid in children))


def test_stop_asks_before_it_kills(driver: Driver, tmp_path: Path) -> None:
    process = driver.start_all("polite", "stubborn")
    children = pids(tmp_path, "polite") + pids(tmp_path, "stubborn")

    process.terminate()

    assert process.wait(TIMEOUT_S) == 0
    assert (tmp_path / "left").exists()
    assert not any(is_alive(pid) for pid in children)


def test_child_that_cannot_start_shows_its_last_words(driver: Driver) -> None:
    process = driver.start("failing")

    output, _ = process.communicate(timeout=TIMEOUT_S)

    assert process.returncode == 1
    assert "failing did not start (exit code 3)" in output
    assert "cannot find the thing" in output


def test_wrong_configuration_is_not_tried_again(driver: Driver, tmp_path: Path) -> None:
    process = driver.start("misconfigured")

    assert process.wait(TIMEOUT_S) == 1
    assert len(pids(tmp_path, "try")) == 1


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        yield process
        process.kill()


def test_later_supervisor_ends_what_an_earlier_one_left(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    orphan.Record(tmp_path / "processes.json").note("billing", sleeper.pid)

    got = orphan.Record(tmp_path / "processes.json").end_leftovers({})

    assert got == ["billing"]
    assert sleeper.wait(TIMEOUT_S) == -signal.SIGKILL


def test_record_does_not_end_a_stranger_with_the_same_number(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    path = tmp_path / "processes.json"
    orphan.Record(path).note("billing", sleeper.pid)
    found = orphan.find(sleeper.pid)
    assert found is not None
    path.write_text(path.read_text().replace(str(found.start), str(found.start - 1)))

    assert orphan.Record(path).end_leftovers({}) == []
    assert sleeper.poll() is None


def test_record_of_another_boot_is_no_record(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    path = tmp_path / "processes.json"
    orphan.Record(path).note("billing", sleeper.pid)
    path.write_text(path.read_text().replace('"boot": "', '"boot": "another'))

    assert orphan.Record(path).end_leftovers({}) == []
    assert sleeper.poll() is None


def test_log_is_moved_aside_when_it_is_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.local.child.LOG_BYTES_MAX", 10)
    log = Log(tmp_path / "x.log")
    descriptor = log.open()
    os.write(descriptor, b"more than ten bytes\n")

    log.trim()
    os.write(descriptor, b"new\n")
    os.close(descriptor)

    assert log.path.read_text() == "new\n"
    assert (tmp_path / "x.log.1").read_text() == "more than ten bytes\n"
    assert log.tail() == "    new"


def test_stack_trace_in_a_log_line_is_shown_as_lines(tmp_path: Path) -> None:
    log = Log(tmp_path / "x.log")
    log.path.write_text('plain\n{"event": "failed", "exception": "Traceback:\\n  here"}\n')

    assert log.tail() == '    plain\n    {"event": "failed"}\n    Traceback:\n      here'
