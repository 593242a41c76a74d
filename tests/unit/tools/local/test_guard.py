"""tools/local/guard.py: one supervisor for a state directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools.local import guard


def test_second_supervisor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "supervisor.pid"

    with (
        guard.acquire(path),
        pytest.raises(guard.AlreadyRunning, match=f"process {os.getpid()}"),
    ):
        guard.acquire(path)


def test_lock_ends_with_its_holder(tmp_path: Path) -> None:
    """A process id left behind in the file says nothing."""
    path = tmp_path / "supervisor.pid"

    with guard.acquire(path):
        assert guard.holder(path) == os.getpid()

    assert guard.holder(path) is None
    guard.acquire(path).close()


def test_nobody_holds_what_is_not_there(tmp_path: Path) -> None:
    assert guard.holder(tmp_path / "supervisor.pid") is None
