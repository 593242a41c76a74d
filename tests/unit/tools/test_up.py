"""What a start says of what an earlier one has left."""

from __future__ import annotations

from pathlib import Path

from tools.local.options import parse
from tools.up import left_behind


def test_gateways_that_are_not_run_any_more_are_named_while_they_have_something_to_settle(
    tmp_path: Path,
) -> None:
    for name, file in {
        "gateway": "00000001-00000001.journal",
        "gateway-2": "00000001-00000001.journal",
        "gateway-3": "00000001-00000001.journal",
        "gateway-4": "lock",
        "gateway-5": "00000001-00000001.damaged",
    }.items():
        folder = tmp_path / name / "journal"
        folder.mkdir(parents=True)
        (folder / file).touch()
    common = ["--state", str(tmp_path), "--engine", "sim"]

    assert left_behind(parse([*common, "--gateways", "2"])) == ["gateway-3"]
    assert left_behind(parse([*common, "--gateways", "3"])) == []


def test_a_first_start_has_nothing_behind_it(tmp_path: Path) -> None:
    assert left_behind(parse(["--state", str(tmp_path / "new"), "--engine", "sim"])) == []
