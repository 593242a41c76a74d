"""What the repository holds: the files that tidy looks at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {"build", "gen", "node_modules"}
"""Folders that are made, not written; hidden ones are left out too."""


def files(folder: str, ending: str) -> list[Path]:
    """Files below a folder of the repository by the end of their names."""

    def walk(path: Path) -> Iterator[Path]:
        for entry in sorted(path.iterdir()):
            if entry.name.startswith(".") or entry.name in SKIPPED or entry.is_symlink():
                continue
            if entry.is_dir() and not entry.name.endswith(".egg-info"):
                yield from walk(entry)
            elif entry.name.endswith(ending):
                yield entry

    return list(walk(ROOT / folder))


def name_of(path: Path) -> str:
    """Path from the root, for people."""
    return str(path.relative_to(ROOT))


def services() -> list[Path]:
    """The folder of each service."""
    return sorted(path for path in (ROOT / "services").iterdir() if (path / "__main__.py").exists())
