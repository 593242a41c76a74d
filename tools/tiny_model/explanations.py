"""Short explanations: what a thing is, where it lives, and a few whys for small children.

Pure: the facts of the tables of kinds and settings, and the table `tables/whys.txt`.
"""

from __future__ import annotations

from tools.tiny_model.cast import KINDS, Kind, article, plural
from tools.tiny_model.chance import Chance
from tools.tiny_model.settings import SETTINGS, Setting
from tools.tiny_model.tables import read_rows
from tools.tiny_model.wording import choose

_WHYS: tuple[tuple[str, str], ...] = tuple((row[0], row[1]) for row in read_rows("whys"))
_ABOUT_KIND: tuple[str, ...] = (
    "what is {a_noun}", "tell me about {nouns}", "what do you know about {nouns}",
    "explain what {a_noun} is", "tell me something about {nouns}", "what are {nouns}",
    "tell me a fact about {nouns}", "[tell me about|describe] the {noun}",
)  # fmt: skip
_ABOUT_SETTING: tuple[str, ...] = (
    "what is {topic}", "explain what {topic} is", "tell me about {topic}",
    "what do you know about {topic}", "explain {topic}", "[describe|explain to me] {topic}",
    "[can you explain|what does it mean:] {topic}",
)  # fmt: skip
_MASSES = frozenset(
    {"snow", "rain", "wind", "fog", "sunshine", "ice", "spring", "summer", "autumn", "winter",
     "night", "sea", "moon", "jungle", "desert"}
)  # fmt: skip


def draw_explanation(chance: Chance) -> tuple[str, str]:
    """Return a question and its answer."""
    if chance.happens(0.4):
        question, answer = chance.pick(_WHYS)
        return choose(question, chance), answer
    if chance.happens(0.5):
        return about_kind(chance.pick(KINDS), chance)
    return _about_setting(chance)


def about_kind(kind: Kind, chance: Chance) -> tuple[str, str]:
    """Return a question about a kind of character and the fact that answers it."""
    question = choose(chance.pick(_ABOUT_KIND), chance)
    words = {"a_noun": article(kind.noun), "nouns": plural(kind.noun), "noun": kind.noun}
    return question.format(**words), kind.fact


def _about_setting(chance: Chance) -> tuple[str, str]:
    setting: Setting = chance.pick(SETTINGS)
    noun = setting.noun
    topic = noun if noun in _MASSES else article(noun)
    if noun in {"sea", "moon", "jungle", "desert", "night"}:
        topic = f"the {noun}"
    return choose(chance.pick(_ABOUT_SETTING), chance).format(topic=topic), setting.fact
