from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from tools.export.options import OptionError, parse

LEAST = ["--endpoint", "h:1", "--format", "focus"]
KEY = {"MAAS_KEY": "mk_1"}


def test_days_and_times_are_those_of_utc() -> None:
    found = parse([*LEAST, "--from", "2026-01-31", "--to", "2026-02-01T02:00:00+02:00"], KEY)

    assert found.start_time == datetime(2026, 1, 31, tzinfo=UTC)
    assert found.end_time == datetime(2026, 2, 1, tzinfo=UTC)
    assert found.key == "mk_1"


def test_key_of_a_file_counts_more_than_the_variable(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("mk_2\n")

    assert parse([*LEAST, "--key-file", str(path)], KEY).key == "mk_2"


@pytest.mark.parametrize(
    ("flags", "environment", "said"),
    [
        ([], {}, "MAAS_KEY"),
        (["--key-file", "/nonexistent"], KEY, "/nonexistent"),
        (["--from", "yesterday"], KEY, "--from yesterday"),
        (["--from", "2026-01-02", "--to", "2026-01-02"], KEY, "--to must be after"),
        (["--provider", ""], KEY, "--provider"),
        (["--endpoint", "nowhere"], KEY, "HOST:PORT"),
        (["--what", "credits"], KEY, "--parent"),
    ],
)
def test_flags_that_cannot_be_are_named(
    flags: list[str], environment: dict[str, str], said: str
) -> None:
    with pytest.raises(OptionError, match=said):
        parse([*LEAST, *flags], environment)
