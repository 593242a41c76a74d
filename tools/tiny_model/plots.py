"""What happens in our stories: plots as beats, each beat told in several ways.

Data only, in the notation of `wording`; the table is `tables/plots.txt`. The hero is {name}, {kind}
{he} {him} {his}; the friend is {friend}, {friend_kind}, {fhe} {fhim} {fhis}; {thing} has its look,
{key} is its bare noun; {where}, {spot} and {mark} belong to the setting.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.tiny_model.tables import read_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A plot.

    Attributes:
        noun: Its short name.
        themes: How a prompt asks for it, each fits after "a story about".
        beats: The story, beat by beat; each beat is a tuple of ways to tell it.
        gist: The whole story in one or two sentences.
        moral: What was learned, a sentence.
    """

    noun: str
    themes: tuple[str, ...]
    beats: tuple[tuple[str, ...], ...]
    gist: tuple[str, ...]
    moral: str


def _plot(block: list[list[str]]) -> Plot:
    (head, gist, moral, *first_beat), *other_beats = block
    noun, themes = head.split(":")
    return Plot(
        noun=noun,
        themes=tuple(theme.strip() for theme in themes.split(",")),
        beats=(tuple(first_beat), *(tuple(beat) for beat in other_beats)),
        gist=tuple(gist.split(" / ")),
        moral=moral,
    )


PLOTS: tuple[Plot, ...] = tuple(_plot(block) for block in read_blocks("plots"))
