"""tests/bench/processes.py: CPU time is whole and in the right place."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.bench.processes import Family, children_of, cpu_ns, resident_bytes, using

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SPIN = "import sys, time\nwhile time.process_time() < 0.05: pass\nprint()\nsys.stdin.read()"


@contextmanager
def spinner() -> Iterator[int]:
    """A process that has used 50 ms and does nothing more."""
    with subprocess.Popen(
        [sys.executable, "-c", SPIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.stdin.close()


def test_time_of_another_process_is_read() -> None:
    with spinner() as pid:
        found_ns = cpu_ns(pid)

    assert found_ns >= 50_000_000


def test_threads_that_have_ended_are_counted() -> None:
    before = cpu_ns(os.getpid())

    def spin() -> None:
        ends_s = time.thread_time() + 0.03
        while time.thread_time() < ends_s:
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    thread.join()

    assert cpu_ns(os.getpid()) - before >= 30_000_000


def test_process_that_is_gone_has_no_time() -> None:
    with spinner() as pid:
        assert pid in children_of(os.getpid())
        assert resident_bytes(pid) > 1_000_000

    with pytest.raises(OSError, match=r"."):
        cpu_ns(pid)


def test_process_that_begins_meanwhile_counts_whole_and_what_was_before_does_not() -> None:
    with spinner() as early:
        late: list[int] = []

        def family() -> Family:
            return {"early": [early], "late": late}

        with using(family) as usage, spinner() as pid:
            late.append(pid)
            usage.sample()

    assert usage.seconds["early"] < 0.05
    assert usage.seconds["late"] >= 0.05
