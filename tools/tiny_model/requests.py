"""How people ask for a story: the wish, and the many ways to word it.

Pure: chance comes in as an argument. The wording is a prompt as somebody would type it, with or
without capitals and punctuation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tools.tiny_model.cast import BOY_NAMES, GIRL_NAMES, KINDS, Kind, article
from tools.tiny_model.chance import Chance
from tools.tiny_model.plots import PLOTS
from tools.tiny_model.scene import TRAITS, Split, Wish, draw_wish_pair, may_meet
from tools.tiny_model.settings import PLACES, TIMES, Setting
from tools.tiny_model.story import Length
from tools.tiny_model.things import THINGS
from tools.tiny_model.wording import choose

STORY_REQUESTS: tuple[str, ...] = (
    "[please |]tell me a {size} [story|story|story|tale|bedtime story] about {about}",
    "tell me a {size} story about {about}[, please| please|]",
    "[can|could|will|would] you [please |]tell me a {size} [story|tale] about {about}?",
    "[can|could] you [write|make up|invent] a {size} [story|tale] about {about}?",
    "[please |]write [me |]a {size} [story|tale|children's story] about {about}",
    "i [want|would like|need] a {size} [story|tale] about {about}",
    "i [want|would like|would love] to hear a {size} story about {about}",
    "a {size} story about {about}[ please|, please|]",
    "[give|read|send] me a {size} [story|tale] about {about}",
    "make up a {size} story about {about}",
    "do you know a {size} [story|tale] about {about}?",
    "[how about|what about|let us hear] a {size} story about {about}[?|]",
    "my [son|daughter|child|little sister|class] wants a {size} story about {about}",
    "hello[, |! ]tell me a {size} story about {about}",
    "tell a {size} story about {about}",
    "a {size} [tale|story] of {about}",
    "story about {about}",
    "story: {about}",
    "once upon a time there was {about}",
    "once upon a time, {about}",
    "{about}",
)
FREE_REQUESTS: tuple[str, ...] = (
    "[please |]tell me a {size} [story|tale|bedtime story][, please|]",
    "[can|could] you tell me a {size} story?",
    "i want [to hear |]a {size} story",
    "write a {size} story",
    "[a story|a tale|story], please",
    "once upon a time",
    "tell me something [nice|funny|new]",
    "do you know a [good |]{size} story?",
    "i am [bored|sad|tired][. tell me a story|, tell me a story]",
    "it is [bedtime|late]. a {size} story, please",
)
_SIZES = {
    Length.SHORT: ("short", "very short", "little short", "quick"),
    Length.NORMAL: ("", "", "", "", "nice", "little", "good", "funny", "new"),
    Length.LONG: ("long", "longer", "very long"),
}
_LENGTHS = ((4, Length.SHORT), (15, Length.NORMAL), (1, Length.LONG))
_TIME_WORDINGS = {
    "snow": ("on a snowy day", "when it snows", "in the deep snow", "in snow"),
    "rain": ("on a rainy day", "when it rains", "in the heavy rain"),
    "wind": ("on a windy day", "in the strong wind"),
    "storm": ("on a stormy day", "in a big storm", "in a storm"),
    "fog": ("on a foggy day", "in the thick fog"),
    "sunshine": ("on a sunny day", "in the warm sunshine"),
    "ice": ("on the frozen ice", "on the thick ice"),
    "spring": ("in the spring", "on a spring day"),
    "summer": ("in the summer", "on a summer day"),
    "autumn": ("in the autumn", "on an autumn day"),
    "winter": ("in the winter", "on a winter day"),
    "night": ("in the night", "late at night", "in the dark night"),
}
_SYLLABLES = (
    "ba", "bo", "di", "do", "fa", "fi", "ga", "go", "ka", "ki", "la", "li", "lo", "ma", "mi",
    "mo", "na", "ni", "no", "pa", "pe", "ra", "ri", "ro", "sa", "si", "ta", "ti", "to", "va",
    "vi", "wo", "ya", "za", "zi", "zu", "bel", "dan", "fer", "gin", "kal", "lan", "mar", "nel",
    "per", "ron", "sel", "tan", "vin", "win",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request for a story.

    Attributes:
        text: The prompt as typed.
        wish: What the story has to be about.
        length: How long it is to be.
        required: Words that the story must have because the prompt has them.
    """

    text: str
    wish: Wish
    length: Length
    required: tuple[str, ...]


def draw_request(chance: Chance, split: Split = Split.TRAIN) -> Request:
    """Return a random request; in the held-out split it always has a held-out pair."""
    wish = _draw_wish(chance, split)
    length = chance.weigh(_LENGTHS)
    about = describe(wish, chance)
    template = chance.pick(STORY_REQUESTS if about else FREE_REQUESTS)
    if "{size}" not in template:
        length = Length.NORMAL
    text = choose(template, chance)
    text = text.replace("{size}", chance.pick(_SIZES[length])).replace("{about}", about)
    return Request(
        text=as_typed(text, chance), wish=wish, length=length, required=required_words(wish)
    )


def required_words(wish: Wish) -> tuple[str, ...]:
    """Return what a story must mention to grant this wish."""
    parts = (wish.kind, wish.friend_kind, wish.setting, wish.time, wish.thing)
    nouns = tuple(part.noun for part in parts if part is not None)
    return nouns if wish.name is None else (*nouns, wish.name)


def describe(wish: Wish, chance: Chance) -> str:
    """Return the wish as the words after "a story about"; empty if everything is left open."""
    place = "".join(
        " " + word_setting(part, chance) for part in (wish.setting, wish.time) if part is not None
    )
    theme = chance.pick(wish.plot.themes) if wish.plot else ""
    thing = article(wish.thing.noun) if wish.thing else ""
    if wish.kind is None:
        bare = [theme, thing, _as_topic(wish.setting) if wish.setting else ""]
        return " and ".join(part for part in bare if part)
    about = _describe_hero(wish, wish.kind, chance)
    if wish.friend_kind:
        about += f" and {article(wish.friend_kind.noun)}"
    if thing:
        joint = chance.pick(("and", "with", "who finds", "who has", "who wants"))
        about = f"{about} {joint} {thing}" if joint == "and" else f"{about}{place} {joint} {thing}"
        return about + (place if joint == "and" else "")
    if theme:
        joint = chance.pick((" and ", ", about ", " with the theme "))
        return f"{about}{place}{joint}{theme}"
    verb = chance.pick(("", "", "", "", " playing", " who lives", " lost", " walking"))
    return f"{about}{verb if place else ''}{place}"


def word_setting(setting: Setting, chance: Chance) -> str:
    """Return the phrase that a prompt uses for a setting; mostly the plain one."""
    if setting.noun in _TIME_WORDINGS and chance.happens(0.4):
        return chance.pick(_TIME_WORDINGS[setting.noun])
    if "the " not in setting.where or chance.happens(0.8):
        return setting.where
    place = setting.where.split("the ", 1)[1]
    return chance.pick((f"near the {place}", f"at the {place}", f"in {article(place)}"))


def draw_name(chance: Chance, kind: Kind) -> str:
    """Return a name for a hero: one of ours, or now and then one made of syllables.

    Made-up names teach the model to copy a name that it has never met.
    """
    if chance.happens(0.45):
        return "".join(chance.pick(_SYLLABLES) for _ in range(2 + chance.below(2))).capitalize()
    pronoun = kind.pronoun or chance.pick(("he", "she"))
    return chance.pick(BOY_NAMES if pronoun == "he" else GIRL_NAMES)


def as_typed(text: str, chance: Chance) -> str:
    """Return `text` with the capitals and the end mark of a careful or a hasty writer."""
    text = " ".join(text.split()).replace(" ,", ",")
    if not text.endswith("?") and chance.happens(0.4):
        text += chance.pick((".", ".", "!"))
    elif text.endswith("?") and chance.happens(0.25):
        text = text[:-1]
    style = chance.weigh(((10, "sentence"), (5, "typed"), (4, "lower"), (1, "upper")))
    if style == "sentence":
        return text[0].upper() + text[1:]
    return {"typed": text, "lower": text.lower(), "upper": text.upper()}[style]


def _as_topic(setting: Setting) -> str:
    return f"the {setting.noun}" if " the " in setting.where else setting.noun


def _describe_hero(wish: Wish, kind: Kind, chance: Chance) -> str:
    hero = f"{wish.trait} {kind.noun}" if wish.trait else kind.noun
    if wish.name is not None:
        return f"{article(hero)} {chance.pick(('named', 'called', 'with the name'))} {wish.name}"
    return chance.pick((article(hero),) * 5 + (f"the {hero}", hero))


def _draw_wish(chance: Chance, split: Split) -> Wish:
    wish = _draw_topic(chance, split)
    if wish.kind is None or chance.happens(0.75):
        return wish
    return replace(wish, trait=chance.pick(TRAITS))


def _draw_topic(chance: Chance, split: Split) -> Wish:
    kind, setting = draw_wish_pair(chance, split)
    if split is Split.HELD_OUT:
        return Wish(kind=kind, setting=setting)
    return chance.weigh(_TOPICS)(chance, kind, setting)


def _two_settings(chance: Chance, kind: Kind, setting: Setting) -> Wish:
    place = setting if not setting.is_time else _draw_place(chance, kind)
    return Wish(kind=kind, setting=place, time=_draw_time(chance, kind))


def _two_characters(chance: Chance, kind: Kind, setting: Setting) -> Wish:
    friend = _draw_other(chance, kind)
    if not may_meet(friend, (setting,), Split.TRAIN):
        return Wish(kind=kind, setting=setting)
    return Wish(kind=kind, friend_kind=friend, setting=setting)


_TOPICS: tuple[tuple[int, Callable[[Chance, Kind, Setting], Wish]], ...] = (
    (26, lambda _, kind, setting: Wish(kind=kind, setting=setting)),
    (7, lambda chance, kind, setting: Wish(kind=kind, setting=setting, thing=chance.pick(THINGS))),
    (
        8,
        lambda chance, kind, setting: Wish(
            kind=kind, setting=setting, name=draw_name(chance, kind)
        ),
    ),
    (6, _two_settings),
    (6, _two_characters),
    (5, lambda chance, kind, setting: Wish(kind=kind, setting=setting, plot=chance.pick(PLOTS))),
    (10, lambda _, kind, __: Wish(kind=kind)),
    (6, lambda chance, kind, _: Wish(kind=kind, friend_kind=_draw_other(chance, kind))),
    (4, lambda chance, kind, _: Wish(kind=kind, thing=chance.pick(THINGS))),
    (4, lambda chance, kind, _: Wish(kind=kind, plot=chance.pick(PLOTS))),
    (4, lambda chance, kind, _: Wish(kind=kind, name=draw_name(chance, kind))),
    (4, lambda _, __, setting: Wish(setting=setting)),
    (3, lambda chance, _, __: Wish(thing=chance.pick(THINGS))),
    (5, lambda chance, _, __: Wish(plot=chance.pick(PLOTS))),
    (2, lambda _, __, ___: Wish()),
)
"""What people ask for, in percent of the requests."""


def _draw_other(chance: Chance, kind: Kind) -> Kind:
    return chance.pick([other for other in KINDS if other is not kind])


def _draw_place(chance: Chance, kind: Kind) -> Setting:
    return chance.pick([place for place in PLACES if may_meet(kind, (place,), Split.TRAIN)])


def _draw_time(chance: Chance, kind: Kind) -> Setting:
    return chance.pick([time for time in TIMES if may_meet(kind, (time,), Split.TRAIN)])
