"""What the documents say is what there is."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pydantic
import pytest

from libs.config import FailpointsSection
from libs.errors import Code, Reason
from tests.tidy.repository import ROOT, files, name_of, services

README_LINES_MAX = 80

Row = tuple[str, str, tuple[str, ...]]
"""Code, detail, keys of metadata."""


def documented() -> dict[str, Row]:
    """The table of docs/errors.md, by reason."""
    found: dict[str, Row] = {}
    for line in (ROOT / "docs" / "errors.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and re.fullmatch(r"`[A-Z_]+`", cells[0]):
            keys = tuple(key.strip() for key in cells[3].split(",") if key.strip())
            found[cells[0].strip("`")] = (cells[1], cells[2], keys)
    return found


def promised() -> dict[str, Row]:
    """The comments of the contract, by reason."""
    found: dict[str, Row] = {}
    words: list[str] = []
    for line in (ROOT / "protos/maas/common/v1/errors.proto").read_text().splitlines():
        text = line.strip()
        if text.startswith("//"):
            words.append(text[2:].strip())
            continue
        value = re.match(r"ERROR_REASON_(\w+) = [1-9]\d*;", text)
        if value is not None:
            found[value[1]] = row_of(" ".join(words))
        words = []
    return found


def row_of(comment: str) -> Row:
    head = re.match(r"([A-Z_]+)(?: with (\w+))?", comment)
    assert head is not None, comment
    keys = re.search(r"Keys: ([\w, ]+)\.", comment)
    listed = tuple(key.strip() for key in keys[1].split(",")) if keys else ()
    return head[1], head[2] or "", listed


def test_every_reason_is_documented() -> None:
    assert set(documented()) == {reason.value for reason in Reason}


@pytest.mark.parametrize("reason", Reason)
def test_documented_reason_is_that_of_the_contract(reason: Reason) -> None:
    row = documented()[reason.value]

    assert row == promised()[reason.value]
    assert row[0] in Code.__members__


LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def broken_links(path: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = []
    for target in LINK.findall(text):
        place = target.partition("#")[0]
        if not place or "://" in target or target.startswith("mailto:"):
            continue
        if not (path.parent / place).exists():
            found.append(f"{name_of(path)}: {target}")
    return found


def test_relative_links_lead_somewhere() -> None:
    documents = files(".", ".md")

    assert ROOT / "services" / "catalog" / "README.md" in documents
    assert [link for path in documents for link in broken_links(path)] == []


def keys_of(section: type[pydantic.BaseModel]) -> Iterator[str]:
    """Names of the keys of a section and of the sections in it."""
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        nested = [
            kind
            for kind in kinds
            if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)
        ]
        if not nested:
            yield name
        for kind in nested:
            # No operator writes these: libs/failpoints.py has their words.
            if kind is not FailpointsSection:
                yield from keys_of(kind)


@pytest.mark.parametrize("service", services(), ids=name_of)
def test_every_key_of_the_configuration_is_in_the_readme(service: Path) -> None:
    config = importlib.import_module(f"services.{service.name}.config").Config
    words = set(re.findall(r"\w+", (service / "README.md").read_text(encoding="utf-8")))

    assert sorted(set(keys_of(config)) - words) == []


@pytest.mark.parametrize("service", services(), ids=name_of)
def test_readme_of_a_service_is_short(service: Path) -> None:
    lines = (service / "README.md").read_text(encoding="utf-8").splitlines()

    assert len(lines) <= README_LINES_MAX
