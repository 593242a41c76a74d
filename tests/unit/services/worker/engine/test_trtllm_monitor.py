"""What ends an engine that cannot go on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.worker.engine import trtllm_monitor
from services.worker.engine.trtllm_monitor import (
    STUCK_S,
    Monitor,
    Process,
    engine_processes,
    find_dead,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")


class Executor:
    def __init__(self) -> None:
        self.is_down = False
        self.error: Exception | None = None

    def is_shutdown(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.is_down


class Engine:
    def __init__(self) -> None:
        self._executor = Executor()


class NewEngine(Engine):
    """One that says whether it is well."""

    def __init__(self) -> None:
        super().__init__()
        self.is_well = True

    def _check_health(self) -> bool:
        return self.is_well


@pytest.fixture
def helper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_children_are_found_and_missed(helper: subprocess.Popen[bytes]) -> None:
    found = {one for one in engine_processes(os.getpid()) if one.process_id == helper.pid}
    alive = find_dead(frozenset(found))
    helper.kill()
    # Nobody has waited for it: it is dead all the same.
    os.waitid(os.P_PID, helper.pid, os.WEXITED | os.WNOWAIT)

    (process,) = found
    assert process.name == "sleep"
    assert alive is None
    assert find_dead(frozenset(found)) == process


def test_a_process_that_cannot_be_looked_at_is_not_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where this process has no file descriptor left."""
    monkeypatch.setattr(trtllm_monitor, "_PROC", tmp_path)
    process = frozenset({Process(7, 1, "orted")})
    (tmp_path / "7" / "stat").mkdir(parents=True)
    unreadable = find_dead(process)
    (tmp_path / "7" / "stat").rmdir()

    assert unreadable is None
    assert find_dead(process) is not None


def test_what_a_launcher_has_started_counts_and_what_a_python_process_has_does_not() -> None:
    launched = "import subprocess, sys; subprocess.Popen(['sleep', '60']); print(flush=True)"
    shell = subprocess.Popen(["sh", "-c", "sleep 61 & echo; wait"], stdout=subprocess.PIPE)
    python = subprocess.Popen(
        [sys.executable, "-c", f"{launched}; sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        for process in (shell, python):
            assert process.stdout is not None
            process.stdout.readline()
        ours = {one.process_id for one in engine_processes(os.getpid())}
        below_shell = engine_processes(shell.pid)
        below_python = engine_processes(python.pid)

        assert {shell.pid, python.pid} <= ours
        assert {one.process_id for one in below_shell} <= ours
        assert not {one.process_id for one in below_python} & ours
    finally:
        for one in (*below_shell, *below_python):
            os.kill(one.process_id, 9)
        for process in (shell, python):
            process.kill()
            process.communicate()


def test_a_dead_process_is_named_and_the_end() -> None:
    ended = threading.Event()
    monitor = Monitor(Engine(), lambda _: ended.set())
    with subprocess.Popen(["sleep", "60"]) as process:
        watched = {one for one in engine_processes(os.getpid()) if one.process_id == process.pid}
        process.kill()
    try:
        monitor.start(frozenset(watched))
        assert str(process.pid) in monitor.find_fault(time.perf_counter())
        assert ended.wait(5)
    finally:
        monitor.stop()


def test_a_loop_that_stands_still_is_a_fault_only_after_a_while() -> None:
    monitor = Monitor(Engine())
    now_s = time.perf_counter()
    before = monitor.find_fault(now_s + 10 * STUCK_S)
    monitor.beat()

    assert before == ""
    assert monitor.find_fault(now_s + STUCK_S - 1) == ""
    assert "stood still" in monitor.find_fault(now_s + STUCK_S + 1)


def test_an_engine_that_is_shut_down_may_explain_itself_first() -> None:
    engine = Engine()
    monitor = Monitor(engine)
    now_s = time.perf_counter()
    engine._executor.is_down = True

    assert monitor.find_fault(now_s) == ""
    assert "shut itself down" in monitor.find_fault(now_s + 1)
    engine._executor.is_down = False
    assert monitor.find_fault(now_s + 1) == ""


@pytest.mark.parametrize("engine", [object(), Engine()])
def test_an_engine_that_cannot_be_asked_says_nothing(engine: object) -> None:
    if isinstance(engine, Engine):
        engine._executor.error = AttributeError("gone")
    monitor = Monitor(engine)

    assert monitor.find_fault(time.perf_counter()) == ""


def test_an_engine_that_calls_itself_unwell_is_ended_by_a_thread() -> None:
    engine, words, ended = NewEngine(), list[str](), threading.Event()

    def end(why: str) -> None:
        words.append(why)
        ended.set()

    engine.is_well = False
    monitor = Monitor(engine, end)
    monitor.start(frozenset())
    try:
        assert ended.wait(5)
    finally:
        monitor.stop()
    assert "not healthy" in words[0]
