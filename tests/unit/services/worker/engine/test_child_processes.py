"""The processes of an engine's child: what they say last, and that none is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.worker.engine import child_processes
from services.worker.engine.child_life import say_last_words
from services.worker.engine.child_processes import ChildProcess, ChildProgram, kill_orphans

ROOT = Path(__file__).parents[5]
PATIENCE_S = 10.0


def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> ChildProcess:
    """A child that runs a module of its own."""
    (tmp_path / "engine_of_a_test.py").write_text(source, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program = ChildProgram(module="engine_of_a_test", name="test", exit_timeout_s=PATIENCE_S)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        return ChildProcess(program, theirs)


def until_written(path: Path) -> str:
    give_up_s = time.perf_counter() + PATIENCE_S
    while not path.exists() or not path.read_text("utf-8").endswith("\n"):
        assert time.perf_counter() < give_up_s
        time.sleep(0.005)
    return path.read_text("utf-8").strip()


def test_the_last_line_says_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = started(tmp_path, monkeypatch, "raise SystemExit('no memory')")

    assert child.reap() == "the test process exited with status 1: no memory"


def test_last_words_go_before_what_others_say_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        "import sys\n"
        "from services.worker.engine.child_life import say_last_words\n"
        "say_last_words('the engine\\nis gone')\n"
        "sys.exit('Traceback of something else')\n"
    )
    child = started(tmp_path, monkeypatch, source)

    assert child.reap() == "the test process exited with status 1: the engine is gone"


def test_an_engine_that_says_a_lot_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a pipe holds: who did not read would wait for ever, or miss the end."""
    source = (
        "import sys\n"
        "for number in range(4000):\n"
        "    print('a line about nothing in particular, as engines write them', file=sys.stderr)\n"
        "sys.exit('the end of it')\n"
    )
    child = started(tmp_path, monkeypatch, source)
    assert child.stderr_fd is not None
    os.set_blocking(child.stderr_fd, True)
    while child.read_stderr():
        pass

    assert child.reap().endswith("status 1: the end of it")


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_what_a_child_started_dies_with_it_wherever_it_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Daemons of MPI leave the group and the session of who started them."""
    written = tmp_path / "daemon"
    source = (
        "import pathlib, subprocess, sys\n"
        "daemon = subprocess.Popen(['sleep', '300'], start_new_session=True)\n"
        f"pathlib.Path({str(written)!r}).write_text(f'{{daemon.pid}}\\n')\n"
        "sys.exit(3)\n"
    )
    child = started(tmp_path, monkeypatch, source)
    daemon = int(until_written(written))

    assert child.reap() == "the test process exited with status 3"
    assert is_gone(daemon)


DAEMON = (
    "import pathlib, subprocess\n"
    "daemon = subprocess.Popen(['sleep', '300'], start_new_session=True)\n"
    "pathlib.Path({path!r}).write_text(f'{{daemon.pid}}\\n')\n"
)
WORKER = (
    "import socket\n"
    "from services.worker.engine.child_processes import ChildProcess, ChildProgram\n"
    "ours, theirs = socket.socketpair()\n"
    "child = ChildProcess(ChildProgram(module='engine_of_a_test', name='test'), theirs)\n"
    "child._process.wait()\n"
    "{then}\n"
)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("then", ["", "raise SystemExit", "input()"], ids=["dead", "left", "alive"])
def test_what_a_killed_worker_left_is_killed_by_the_next_and_what_a_living_one_has_is_not(
    tmp_path: Path, then: str
) -> None:
    """Left is one that has ended, and that nobody has waited for."""
    written = tmp_path / "daemon"
    (tmp_path / "engine_of_a_test.py").write_text(DAEMON.format(path=str(written)), "utf-8")
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER.format(then=then)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},  # noqa: TID251 - handed on
        stdin=subprocess.PIPE,
    )
    daemon = int(until_written(written))
    if not then:
        worker.wait(PATIENCE_S)
    elif then != "input()":
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)

    kill_orphans()
    try:
        assert is_gone(daemon) is (then != "input()")
    finally:
        worker.communicate(b"\n")
        with contextlib.suppress(ProcessLookupError):
            os.kill(daemon, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="takes another user")
@pytest.mark.parametrize("user", [0, 65534], ids=["ours", "other"])
def test_what_another_user_has_left_is_not_ours_to_kill(user: int) -> None:
    # A worker that is gone: it had our number, and began with the machine.
    mark = f"{child_processes._own_name().partition(':')[0]}:{os.getpid()}:0:0"
    left = subprocess.Popen(["sleep", "60"], env={child_processes.MARK: mark}, user=user)
    try:
        kill_orphans()

        assert is_gone(left.pid) is (user == 0)
    finally:
        left.kill()
        left.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_numbers_of_another_namespace_are_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "1").mkdir()
    monkeypatch.setattr(child_processes, "_PROC", tmp_path)
    for number, found in ((os.getpid(), [1]), (os.getpid() + 1, [])):
        (tmp_path / "self").unlink(missing_ok=True)
        (tmp_path / "self").symlink_to(str(number))

        assert child_processes.process_ids() == found


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_worker_that_cannot_be_looked_at_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_processes, "_PROC", tmp_path)
    (tmp_path / "7" / "stat").mkdir(parents=True)

    assert child_processes._has_owner("1:7:5:00")
    assert not child_processes._has_owner("1:8:5:00")


def is_gone(process_id: int) -> bool:
    """Whether a process does not run any more, within a moment if it was killed."""
    give_up_s = time.perf_counter() + 0.2
    while time.perf_counter() < give_up_s:
        try:
            if not Path(f"/proc/{process_id}/cmdline").read_bytes():
                return True
        except OSError:
            return True
        time.sleep(0.005)
    return False


def test_last_words_are_one_line_and_never_wait(capfd: pytest.CaptureFixture[str]) -> None:
    say_last_words("one\ntwo")

    assert capfd.readouterr().err == "\nlast words: one two\n"
