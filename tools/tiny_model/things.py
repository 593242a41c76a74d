"""The things of our stories: toys, tools and treasures, with what is done with each.

Data only; the table is `tables/things.txt`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.tiny_model.tables import read_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """Something that can be found, lost, shared, given or made.

    Attributes:
        noun: The word that a prompt uses, without an article.
        looks: Adjectives, one of which is chosen for a story.
        joy: A sentence in the past tense about two friends who enjoy it; no slots.
    """

    noun: str
    looks: tuple[str, ...]
    joy: str


def _thing(row: list[str]) -> Thing:
    noun, looks, joy = row
    return Thing(noun=noun, looks=tuple(looks.split("|")), joy=joy)


THINGS: tuple[Thing, ...] = tuple(_thing(row) for row in read_rows("things"))
