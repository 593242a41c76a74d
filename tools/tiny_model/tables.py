"""The texts of the corpus: tables in `tables/*.txt`, which we wrote, and how they are read.

The only module that reads a file while a corpus is made; it reads nothing but those tables. A line
that begins with "#" is a comment, ";" divides the columns of a row.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent / "tables"
_BLOCK_END = "===="
_PART_END = "--"


def read_lines(name: str) -> list[str]:
    """Return the lines of a table without comments and empty lines."""
    text = (_FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def read_rows(name: str) -> list[list[str]]:
    """Return the rows of a table as columns."""
    return [[column.strip() for column in line.split(";")] for line in read_lines(name)]


def read_blocks(name: str) -> list[list[list[str]]]:
    """Return the blocks of a table ("====" between them), each as parts ("--"), each as lines."""
    blocks: list[list[list[str]]] = [[[]]]
    for line in read_lines(name):
        if line == _BLOCK_END:
            blocks.append([[]])
        elif line == _PART_END:
            blocks[-1].append([])
        else:
            blocks[-1][-1].append(line)
    return blocks


@cache
def read_words() -> dict[str, str]:
    """Return the choices that the tables of prompts name by a slot."""
    return {row[0]: row[1] for row in read_rows("words")}


def with_words(template: str) -> str:
    """Return `template` with the slots of the table of words replaced by their choices."""
    for slot, choices in read_words().items():
        template = template.replace(f"{{{slot}}}", choices)
    return template
