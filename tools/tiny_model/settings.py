"""Where and when our stories happen: places, weathers and seasons, with what is seen there.

Data only; the tables are `tables/places.txt` and `tables/times.txt`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.tiny_model.tables import read_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A place, a weather or a season.

    Attributes:
        noun: The word that a prompt uses and the story must take up.
        where: The phrase that puts the story there ("in the snow").
        is_time: True for a weather, a season or a part of the day: it may join a place.
        senses: Sentences in the past tense about what it is like there; no slots.
        spots: Phrases that say where a small thing may be found.
        mark: Something to walk to and to meet at, with its article.
        fact: Two or three true sentences about it.
    """

    noun: str
    where: str
    is_time: bool
    senses: tuple[str, ...]
    spots: tuple[str, ...]
    mark: str
    fact: str


def _setting(row: list[str], *, is_time: bool) -> Setting:
    noun, where, senses, spots, mark, fact = row
    return Setting(
        noun=noun,
        where=where,
        is_time=is_time,
        senses=tuple(senses.split("/")),
        spots=tuple(spots.split("/")),
        mark=mark,
        fact=fact,
    )


PLACES: tuple[Setting, ...] = tuple(_setting(row, is_time=False) for row in read_rows("places"))
TIMES: tuple[Setting, ...] = tuple(_setting(row, is_time=True) for row in read_rows("times"))
SETTINGS: tuple[Setting, ...] = PLACES + TIMES
