"""Secrets of an installation are made once, for the folder that uses them."""

from __future__ import annotations

from pathlib import Path

import pytest

from libs.auth import parse_key, sha256_of
from tools.deploy import credentials


def test_what_is_missing_is_made_and_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").touch()
    secrets = tmp_path / "secrets"

    assert credentials.main([str(tmp_path)]) == 0
    first = {path.name: path.read_text() for path in secrets.iterdir()}
    (secrets / "worker.token").unlink()
    assert credentials.main([str(tmp_path)]) == 0
    second = {path.name: path.read_text() for path in secrets.iterdir()}

    changed = {name for name in first if first[name] != second[name]}
    assert changed == {"worker.token", "worker.sha256"}
    token = second["worker.token"].strip()
    assert sha256_of(token).hex() == second["worker.sha256"].strip()
    assert parse_key(second["admin_key"].strip())
    assert {path.stat().st_mode & 0o777 for path in secrets.iterdir()} == {0o600}


def test_a_folder_that_is_no_installation_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert credentials.main([str(tmp_path)]) == 1
    assert "copy deploy/kubernetes/example" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
