"""Habits of the house that no linter knows. Each test lists all offenders at once."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

from libs.postgres.migrations import read_migrations
from tests.tidy.repository import ROOT, files, name_of, services

FILE_LINES_MAX = 500
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
CODE = [*files("libs", ".py"), *files("services", ".py")]
ALL_CODE = [*CODE, *files("tools", ".py"), *files("tests", ".py")]


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def lines_like(pattern: str, paths: list[Path]) -> list[str]:
    """Places as "file:line: text" whose line matches."""
    expression = re.compile(pattern)
    return [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(lines_of(path), start=1)
        if expression.search(line)
    ]


def test_migrations_are_numbered_without_gaps() -> None:
    names = [
        migration.name
        for service in services()
        for migration in read_migrations(service / "migrations")
    ]

    assert names
    assert [name for name in names if not re.fullmatch(r"\d{4}(_[a-z0-9]+){2,}\.sql", name)] == []


def test_services_and_libs_never_print() -> None:
    assert [
        f"{name_of(path)}:{node.lineno}"
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ] == []


def test_modules_have_telling_names() -> None:
    assert [name_of(path) for path in ALL_CODE if path.stem in VAGUE_NAMES] == []


def test_files_have_a_readable_size() -> None:
    assert [name_of(path) for path in CODE if len(lines_of(path)) > FILE_LINES_MAX] == []


def test_ignored_type_says_why() -> None:
    assert lines_like(r"# type: ignore(\[[\w, -]+\])?\s*$", CODE) == []


def test_open_work_names_its_issue() -> None:
    here = Path(__file__)
    paths = [path for path in ALL_CODE if path != here]

    assert lines_like(r"#.*\b(TODO(?!\(#\d+\): )|FIXME|XXX)\b", paths) == []


def test_every_metric_is_declared_once() -> None:
    declaration = re.compile(r"\b(?:Counter|Gauge|Histogram|Summary)\(\s*\"(\w+)\"")
    names = Counter(
        name for path in CODE for name in declaration.findall(path.read_text(encoding="utf-8"))
    )

    assert [name for name, count in names.items() if count > 1] == []
    assert [name for name in names if not name.startswith("maas_")] == []


def test_contracts_stand_where_their_package_says() -> None:
    for path in files("protos", ".proto"):
        package = re.search(r"^package ([\w.]+);", path.read_text(), flags=re.MULTILINE)
        assert package is not None, name_of(path)
        assert path.parent == ROOT / "protos" / Path(*package[1].split("."))
