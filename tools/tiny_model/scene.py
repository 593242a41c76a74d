"""A scene: everything one story has to agree on, and how it is drawn from what was asked for.

Pure: chance comes in as an argument. Pairs of character and setting that are held out for the
evaluation are never drawn for training, neither for the hero nor for a friend of our choice. A
friend whom a prompt names is not checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from tools.tiny_model.cast import (
    BOY_NAMES,
    FRIEND_NAMES,
    GIRL_NAMES,
    HERO_NAMES,
    KINDS,
    Kind,
    article,
    plural,
)
from tools.tiny_model.chance import Chance
from tools.tiny_model.plots import PLOTS, Plot
from tools.tiny_model.settings import PLACES, SETTINGS, TIMES, Setting
from tools.tiny_model.things import THINGS, Thing

HELD_OUT_SHARE = 0.12
"""Share of all pairs of character and setting that training never sees together."""

_NEVER_HELD_OUT = frozenset({("fox", "snow")})
"""The prompt of our documentation: it is to work well rather than to be a measure."""


class Split(Enum):
    """Which pairs of character and setting a corpus may use."""

    TRAIN = "train"
    HELD_OUT = "held-out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What somebody asked a story to be about; None is left to chance."""

    kind: Kind | None = None
    friend_kind: Kind | None = None
    setting: Setting | None = None
    time: Setting | None = None
    thing: Thing | None = None
    plot: Plot | None = None
    name: str | None = None
    trait: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """Somebody in a story."""

    name: str
    pronoun: str
    kind: Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """The facts of one story; every sentence agrees with them.

    Attributes:
        time: A weather, season or part of the day that joins the setting, or None.
        look: The adjective that goes with the thing.
        trait: The adjective that goes with the hero.
    """

    hero: Person
    friend: Person
    setting: Setting
    time: Setting | None
    thing: Thing
    look: str
    trait: str
    plot: Plot

    def words(self) -> dict[str, str]:
        """Return a word for every slot of the templates."""
        hero, friend = self.hero, self.friend
        thing = f"{self.look} {self.thing.noun}"
        night = self.setting.noun == "night"
        return {
            "name": hero.name,
            "kind": hero.kind.noun,
            "akind": article(hero.kind.noun),
            "home": hero.kind.home,
            "went": f"[{hero.kind.went}]",
            "body": hero.kind.look,
            "trait": self.trait,
            "atrait": article(self.trait),
            **_pronouns(hero.pronoun, prefix=""),
            "friend": friend.name,
            "friend_kind": friend.kind.noun,
            "friend_akind": article(friend.kind.noun),
            "friend_body": friend.kind.look,
            **_pronouns(friend.pronoun, prefix="f"),
            "thing": thing,
            "athing": article(thing),
            "key": self.thing.noun,
            "plural_thing": plural(self.thing.noun),
            "joy": self.thing.joy,
            "place": self.setting.noun,
            "where": self.setting.where,
            "spot": f"[{'|'.join(self.setting.spots)}]",
            "mark": self.setting.mark,
            "sense": f"[{'|'.join(self.setting.senses)}]",
            "time_sense": f"[{'|'.join(self.time.senses)}]" if self.time else "",
            "day_where": "night under the stars" if night else f"day {self.setting.where}",
            "moral": self.plot.moral,
        }


TRAITS: tuple[str, ...] = (
    "little", "small", "young", "shy", "curious", "gentle", "clever", "kind", "quiet", "sleepy",
    "cheerful", "brave", "friendly", "funny", "careful",
)  # fmt: skip


def _pronouns(pronoun: str, *, prefix: str) -> dict[str, str]:
    forms = ("he", "him", "his") if pronoun == "he" else ("she", "her", "her")
    return {f"{prefix}{slot}": form for slot, form in zip(("he", "him", "his"), forms, strict=True)}


def is_held_out(kind: Kind, setting: Setting) -> bool:
    """Return whether this pair is kept for the evaluation, by a hash that never changes."""
    if (kind.noun, setting.noun) in _NEVER_HELD_OUT:
        return False
    digest = hashlib.sha256(f"{kind.noun}+{setting.noun}".encode()).digest()
    return int.from_bytes(digest[:4], "little") < HELD_OUT_SHARE * 2**32


def may_meet(kind: Kind, settings: Sequence[Setting | None], split: Split) -> bool:
    """Return whether a hero of `kind` may stand in all of `settings` in this split.

    In the held-out split at least one of the pairs has to be a held-out one.
    """
    held_out = [is_held_out(kind, setting) for setting in settings if setting is not None]
    return any(held_out) if split is Split.HELD_OUT else not any(held_out)


def draw_wish_pair(chance: Chance, split: Split) -> tuple[Kind, Setting]:
    """Return a random kind and setting that this split allows together."""
    while True:
        kind, setting = chance.pick(KINDS), chance.pick(SETTINGS)
        if may_meet(kind, (setting,), split):
            return kind, setting


def draw_scene(wish: Wish, chance: Chance, split: Split = Split.TRAIN) -> Scene:
    """Return a scene that grants `wish` and leaves the rest to chance.

    Raises:
        ValueError: If the wish itself breaks the split.
    """
    kind, setting, time = _draw_pair(wish, chance, split)
    hero = _draw_person(kind, wish.name, HERO_NAMES, chance)
    friend_kind = wish.friend_kind or _draw_friend_kind(kind, (setting, time), chance)
    friend = _draw_person(friend_kind, None, _without(FRIEND_NAMES, hero.name), chance)
    thing = wish.thing or chance.pick(THINGS)
    return Scene(
        hero=hero,
        friend=friend,
        setting=setting,
        time=time,
        thing=thing,
        look=chance.pick(thing.looks),
        trait=wish.trait or chance.pick(TRAITS),
        plot=wish.plot or chance.pick(PLOTS),
    )


def _draw_pair(wish: Wish, chance: Chance, split: Split) -> tuple[Kind, Setting, Setting | None]:
    for _ in range(1000):
        kind = wish.kind or chance.pick(KINDS)
        # Half of the free settings are weathers and seasons, though there are fewer of them.
        free = chance.pick(TIMES) if chance.happens(0.35) else chance.pick(PLACES)
        setting = wish.setting or free
        time = wish.time
        if time is None and not setting.is_time and wish.setting is None and chance.happens(0.2):
            time = chance.pick(TIMES)
        if may_meet(kind, (setting, time), split):
            return kind, setting, time
    raise ValueError(f"no pair of {split.value} grants this wish: {wish}")


def _draw_friend_kind(hero_kind: Kind, settings: Sequence[Setting | None], chance: Chance) -> Kind:
    while True:
        kind = chance.pick(KINDS)
        if kind is not hero_kind and may_meet(kind, settings, Split.TRAIN):
            return kind


def _without(pool: Mapping[str, Sequence[str]], taken: str) -> dict[str, list[str]]:
    return {key: [name for name in names if name != taken] for key, names in pool.items()}


def _draw_person(
    kind: Kind, name: str | None, pool: Mapping[str, Sequence[str]], chance: Chance
) -> Person:
    if name is not None:
        known = {**dict.fromkeys(BOY_NAMES, "he"), **dict.fromkeys(GIRL_NAMES, "she")}
        guess = kind.pronoun or known.get(name) or chance.pick(("he", "she"))
        return Person(name=name, pronoun=guess, kind=kind)
    pronoun = kind.pronoun or chance.pick(("he", "she"))
    return Person(name=chance.pick(pool[pronoun]), pronoun=pronoun, kind=kind)
