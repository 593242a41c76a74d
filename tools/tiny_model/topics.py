"""The prompts of the evaluation, and how an answer to one of them is judged.

Pure and deterministic. The judge looks at words only: it can tell that a story is about a fox in
the snow and that its pronouns agree, not that it is a good story.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tools.tiny_model.cast import BOY_NAMES, GIRL_NAMES, KINDS, Kind, article, plural
from tools.tiny_model.chance import Chance
from tools.tiny_model.chat_format import as_chat_prompt
from tools.tiny_model.phrases import LEADS
from tools.tiny_model.scene import Split, is_held_out
from tools.tiny_model.settings import SETTINGS, Setting

CHARACTERS_MAX = 2
"""A hero and a friend."""

_ASKS: tuple[str, ...] = (
    "tell me a story about {about}",
    "Tell me a story about {about}.",
    "Write a tale about {about}",
    "Can you tell me a story about {about}?",
    "a story about {about} please",
)
_PRONOUNS = {"he": {"he", "him", "his"}, "she": {"she", "her", "hers"}}
_KIND_NOUNS = {kind.noun for kind in KINDS}
_WORD = re.compile(r"[A-Za-z']+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """A character and a setting to ask for."""

    kind: Kind
    setting: Setting

    def prompt(self, chance: Chance, *, chat: bool) -> str:
        """Return a prompt for this topic, plain or as a chat with one message."""
        about = f"{article(self.kind.noun)} {self.setting.where}"
        text = chance.pick(_ASKS).format(about=about)
        return as_chat_prompt(text) if chat else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the words of one story say about it.

    Attributes:
        on_topic: Both topic words are in it.
        consistent: At most two characters are named, each of one kind; every pronoun fits one of
            them; the hero is of the asked kind and is still there after the opening.
    """

    on_topic: bool
    consistent: bool


def draw_topics(seed: str, count: int, split: Split) -> list[Topic]:
    """Return `count` different topics whose pair is, or is not, held out of training."""
    wanted = split is Split.HELD_OUT
    pairs = [(k, s) for k in KINDS for s in SETTINGS if is_held_out(k, s) is wanted]
    return [Topic(kind=k, setting=s) for k, s in Chance(seed).shuffled(pairs)[:count]]


def judge(topic: Topic, story: str) -> Verdict:
    """Return the verdict on `story` as an answer to `topic`."""
    story = _without_lead(story)
    words = set(_WORD.findall(story.lower()))
    return Verdict(
        on_topic=_mentions(words, topic.kind.noun) and _mentions(words, topic.setting.noun),
        consistent=_is_consistent(topic, story),
    )


def _without_lead(story: str) -> str:
    story = story.strip()
    for lead in LEADS:
        story = story.removeprefix(lead)
    return story


def distinct_share(stories: Sequence[str]) -> float:
    """Return the share of different texts, a number in (0, 1]."""
    return len(set(stories)) / len(stories)


def overlap(first: str, second: str, size: int = 5) -> float:
    """Return the Jaccard overlap of the runs of `size` words of two texts, in [0, 1]."""
    one, other = _runs(first, size), _runs(second, size)
    return len(one & other) / max(1, len(one | other))


def _runs(text: str, size: int) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}


def _mentions(words: set[str], noun: str) -> bool:
    """Return whether `noun`, its plural or an adjective of it ("snowy") is among `words`."""
    return bool(words & {noun, plural(noun), f"{noun}y", f"{noun}'s"})


def _is_consistent(topic: Topic, story: str) -> bool:
    named = {name for name in (*BOY_NAMES, *GIRL_NAMES) if _has(story, name)}
    # The hero is introduced in the first paragraph by kind and by name.
    opening, _, rest = story.partition("\n\n")
    heroes = [name for name in named if _has(opening, name)]
    if len(heroes) != 1 or len(named) > CHARACTERS_MAX:
        return False
    stays = _has(opening, topic.kind.noun) and _has(rest, heroes[0])
    return stays and _pronouns_fit(story, named) and all(_is_one(story, name) for name in named)


def _has(text: str, word: str) -> bool:
    return re.search(rf"\b{word}\b", text) is not None


def _pronouns_fit(story: str, named: set[str]) -> bool:
    used = set(_WORD.findall(story.lower()))
    has_boy, has_girl = bool(named & {*BOY_NAMES}), bool(named & {*GIRL_NAMES})
    return (has_boy or not used & _PRONOUNS["he"]) and (has_girl or not used & _PRONOUNS["she"])


def _is_one(story: str, name: str) -> bool:
    """Return whether `name` belongs to one character: of one kind, and never beside itself."""
    told = re.findall(rf"\b{name}(?: the|, an?) (\w+)|(\w+) (?:named|called) {name}\b", story)
    kinds = {word for pair in told for word in pair} & _KIND_NOUNS
    return len(kinds) <= 1 and not _has(story, f"{name} and {name}")
