"""libs/postgres/migrations.py: the files."""

from __future__ import annotations

from pathlib import Path

import pytest

from libs.postgres.migrations import MigrationError, read_migrations


def folder_of(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).write_text(f"-- {name}")
    return path


def test_files_are_read_in_order(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "0002_add_b.sql", "0001_add_a.sql")

    got = read_migrations(folder)

    assert [(item.number, item.name, item.sql) for item in got] == [
        (1, "0001_add_a.sql", "-- 0001_add_a.sql"),
        (2, "0002_add_b.sql", "-- 0002_add_b.sql"),
    ]
    assert len({item.sha256 for item in got}) == 2


@pytest.mark.parametrize(
    "names",
    [
        ("0002_add_b.sql",),
        ("0001_add_a.sql", "0003_add_c.sql"),
        ("0001_add_a.sql", "0001_add_b.sql"),
        ("1_add_a.sql",),
        ("0001-add-a.sql",),
    ],
)
def test_numbers_without_gaps_are_demanded(tmp_path: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(MigrationError):
        read_migrations(folder_of(tmp_path, *names))
