"""tools/setup.py: when it does nothing, and when it refuses. What it installs is not tried here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import setup

SCRIPT = Path(setup.__file__)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "tools").mkdir()
    shutil.copy(SCRIPT, tmp_path / "tools")
    for name in ("requirements.lock", "requirements-dev.lock", "pyproject.toml"):
        (tmp_path / name).write_text(name)
    return tmp_path


def run(clone: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-S", str(clone / "tools" / "setup.py")],
        capture_output=True,
        text=True,
        check=False,
    )


def test_nothing_happens_when_nothing_has_changed(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "ROOT", clone)
    environment = clone / ".venv"
    environment.mkdir()
    (environment / "place").write_text(setup.place())
    stamp = setup.stamp_of([clone / "requirements.lock"])
    (environment / "stamp-requirements.lock").write_text(stamp)

    got = run(clone)

    assert (got.returncode, got.stdout, got.stderr) == (0, "", "")


def test_environment_of_someone_else_is_not_removed(clone: Path) -> None:
    (clone / ".venv").mkdir()
    (clone / ".venv" / "precious").touch()

    got = run(clone)

    assert got.returncode == 1
    assert "was not made by this script" in got.stderr
    assert (clone / ".venv" / "precious").exists()


def test_stamp_follows_lock_and_project(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "ROOT", clone)
    lock = clone / "requirements.lock"
    first = setup.stamp_of([lock])
    lock.write_text("changed")
    second = setup.stamp_of([lock])
    (clone / "pyproject.toml").write_text("changed")
    third = setup.stamp_of([lock])

    assert len({first, second, third}) == 3


@pytest.mark.parametrize(
    ("version", "want"),
    [((3, 10), False), ((3, 11), True), ((3, 13), True), ((3, 14), False), ((2, 7), False)],
)
def test_supported_python(version: tuple[int, int], want: bool) -> None:  # noqa: FBT001
    assert setup.is_supported(version) == want
