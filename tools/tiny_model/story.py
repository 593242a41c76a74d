"""How a scene becomes a story of the asked length, and a gist of it.

Pure: the same scene and the same chance give the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from tools.tiny_model.chance import Chance
from tools.tiny_model.scene import Scene
from tools.tiny_model.wording import fill


class Length(Enum):
    """How long a story is to be: about 70, 160 and 230 tokens."""

    SHORT = "short"
    NORMAL = "normal"
    LONG = "long"


_PLACE_OPENINGS: tuple[str, ...] = (
    "Once upon a time, there was {atrait} {kind} named {name} who lived {where}.",
    "Once upon a time, {atrait} {kind} named {name} lived {where}.",
    "Long ago, {where}, there lived {atrait} {kind}. {his} name was {name}.",
    "There once was {atrait} {kind} called {name}. {name} lived {where}.",
    "{name} was {atrait} {kind} with {body}. {he} lived {where}.",
    "One fine day, {atrait} {kind} named {name} was playing {where}.",
    "A {kind} with {body} lived {where}. {his} name was {name}.",
)
_TIME_OPENINGS: tuple[str, ...] = (
    "Once upon a time, there was {atrait} {kind} named {name} who loved to be out {where}.",
    "Once upon a time, {atrait} {kind} named {name} was out {where}.",
    "One day, {where}, {atrait} {kind} {went} along. {his} name was {name}.",
    "There once was {atrait} {kind} called {name}. {name} was out {where}.",
    "{name} was {atrait} {kind} with {body}. Nothing was better to {him} than a walk {where}.",
    "Not so long ago, {atrait} {kind} named {name} was playing {where}.",
    "A {kind} with {body} was out {where}. {his} name was {name}.",
)
_PORTRAITS: tuple[str, ...] = (
    "{he} had {body}[| and a [big|kind|brave] heart].",
    "Everybody {where} knew {him} by {his} smile.",
    "{name} was [always hungry|always singing|never bored|good at listening|full of ideas].",
    "{his} {home} was small, but it was [warm|cosy|bright].",
    "Most of all, {name} liked [honey cake|stories|long walks|the stars|apple juice|songs].",
)
_AFTERWARDS: tuple[str, ...] = (
    "After that, they [rested|sat down] near {mark} and shared [an apple|some bread|a few nuts].",
    '"I am glad that you are here," said {name}. "I am glad, too," said {friend}.',
    '"What a day!" said {friend}, and {name} laughed.',
    "{friend} [hummed|sang] a little song, and {name} [sang too|listened|felt warm inside].",
    "They [talked|played|laughed] until [the sun went down|it was late].",
    "The next day, they met again near {mark}.",
)
_ENDINGS: tuple[str, ...] = (
    "From that day on, {name} and {friend} were [best friends|the best of friends].",
    "And {name} the {kind} was happy.",
    "It had been a [good|wonderful|long] {day_where}.",
    "That evening, {name} the {kind} went home [tired and happy|with a smile|to {his} {home}].",
    "And if you go out {where}, you may still see {name} and {friend} [today|there].",
    "{name} never forgot that {day_where}.",
    "That night, {name} slept [very well|soundly] and dreamed of {the_dream}.",
)
_MORALS: tuple[str, ...] = (
    "And {name} learned this: {moral}",
    "{moral}",
    'And {friend} said, "{moral}"',
)


def tell(scene: Scene, length: Length, chance: Chance) -> str:
    """Return the story of `scene`; paragraphs are divided by one empty line."""
    words = {**scene.words(), "the_dream": _dream(scene)}
    opening = chance.pick(_TIME_OPENINGS if scene.setting.is_time else _PLACE_OPENINGS)
    first = [opening, "{sense}"]
    if scene.time is not None:
        first.append("{time_sense}")
    if length is Length.SHORT:
        told = _introducing_gist(scene, chance)
        # An ending must not name a friend whom the gist has left out.
        endings = [end for end in _ENDINGS if "{friend}" in told or "{friend}" not in end]
        paragraphs = [[*first, chance.pick(_PORTRAITS)], [told, chance.pick(endings)]]
        if chance.happens(0.5):
            paragraphs[1].append("{moral}")
    else:
        paragraphs = _full_paragraphs(scene, first, length, chance)
    finished = (fill(" ".join(sentences), words, chance) for sentences in paragraphs)
    return "\n\n".join(_mend_articles(paragraph) for paragraph in finished)


def tell_with(scene: Scene, length: Length, required: Sequence[str], chance: Chance) -> str | None:
    """Return a story of `scene` that has all the `required` words, or None if none comes up.

    Not every way of telling a beat mentions the thing; what somebody asked for must be in.
    """
    for _ in range(12):
        text = tell(scene, length, chance)
        if all(word in text for word in required):
            return text
    return None


def gist(scene: Scene, chance: Chance) -> str:
    """Return the story of `scene` in one paragraph of three sentences or so."""
    start = chance.pick(
        (
            "{akind} named {name} was {where}.",
            "It is about {akind} named {name} {where}.",
            "{name} the {kind} was {where}.",
        )
    )
    template = f"{start} {_introducing_gist(scene, chance)} {scene.plot.moral}"
    return _mend_articles(fill(template, scene.words(), chance))


def _full_paragraphs(
    scene: Scene, first: list[str], length: Length, chance: Chance
) -> list[list[str]]:
    beats = [chance.pick(beat) for beat in scene.plot.beats]
    if length is Length.LONG:
        portraits = chance.shuffled(_PORTRAITS)
        first = [*first, portraits[0], portraits[1]]
        afterwards = chance.shuffled(_AFTERWARDS)[:3]
        last = [*chance.shuffled(_ENDINGS)[:2], chance.pick(_MORALS)]
        return [first, beats[:2], beats[2:4], [beats[4]], afterwards, last]
    if chance.happens(0.4):
        first = [*first, chance.pick(_PORTRAITS)]
    last = [chance.pick(_ENDINGS)]
    if chance.happens(0.4):
        last.append(chance.pick(_MORALS))
    return [first, beats[:2], beats[2:4], [beats[4], *last]]


def _introducing_gist(scene: Scene, chance: Chance) -> str:
    """Return a gist that says what kind of character the friend is, where it first names it."""
    return chance.pick(scene.plot.gist).replace("{friend}", "{friend} the {friend_kind}", 1)


def _dream(scene: Scene) -> str:
    return f"[the {scene.look} {scene.thing.noun}|tomorrow|new adventures]"


def _mend_articles(text: str) -> str:
    """Return `text` with "an" for "a" before the kinds that begin with a vowel."""
    for letter in "aeio":
        text = text.replace(f"A {letter}", f"An {letter}").replace(f" a {letter}", f" an {letter}")
    return text
