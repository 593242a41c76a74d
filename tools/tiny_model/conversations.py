"""Documents of the corpus: plain stories, prompts with stories, and chats of one to four turns.

Pure: chance comes in as an argument. A document is a list of pieces, each with a mark that says
whether the model is to learn it: it learns answers and stories, never what a user typed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tools.tiny_model.cast import article
from tools.tiny_model.chance import Chance
from tools.tiny_model.chat_format import BEGIN_OF_TEXT, END_OF_TEXT, TURN_END, turn, turn_head
from tools.tiny_model.explanations import draw_explanation
from tools.tiny_model.phrases import ONE_BREATH, READING, SYSTEM_TEXTS
from tools.tiny_model.requests import as_typed, draw_name, draw_request, word_setting
from tools.tiny_model.scene import Scene, Split, Wish, draw_scene, draw_wish_pair
from tools.tiny_model.small_talk import (
    STRANGE_OPENINGS,
    STRANGE_REQUESTS,
    draw_beyond,
    draw_exchange,
)
from tools.tiny_model.story import Length, gist, tell
from tools.tiny_model.story_turns import prompted_story, story_turns
from tools.tiny_model.wording import choose, fill


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a document.

    Attributes:
        text: The text, which may hold special tokens.
        learned: Whether the loss counts its tokens.
    """

    text: str
    learned: bool


Document = list[Piece]


def draw_document(chance: Chance, split: Split = Split.TRAIN) -> Document:
    """Return one random document of the corpus."""
    return chance.weigh(_FORMS)(chance, split)


def _free_story(chance: Chance, split: Split) -> Document:
    wish = Wish()
    if split is Split.HELD_OUT:
        kind, setting = draw_wish_pair(chance, split)
        wish = Wish(kind=kind, setting=setting)
    lengths = (Length.SHORT, Length.NORMAL, Length.NORMAL, Length.NORMAL, Length.LONG)
    story = tell(draw_scene(wish, chance, split), chance.pick(lengths), chance)
    return _plain([Piece(story, learned=True)], chance)


def _plain(pieces: list[Piece], chance: Chance) -> Document:
    head = [Piece(BEGIN_OF_TEXT, learned=False)] if chance.happens(0.3) else []
    return [*head, *pieces, Piece(END_OF_TEXT, learned=True)]


def _prompted(chance: Chance, split: Split) -> Document:
    request = draw_request(chance, split)
    _, story = prompted_story(request, chance, split)
    pause = chance.pick(("\n", "\n\n", "\n\n"))
    return _plain([Piece(request.text, learned=False), Piece(pause + story, learned=True)], chance)


def _one_breath(chance: Chance, split: Split) -> Document:
    """Return a request for a very short answer, and the gist of a story as the answer."""
    kind, setting = draw_wish_pair(chance, split)
    scene = draw_scene(Wish(kind=kind, setting=setting), chance, split)
    about = f"{article(kind.noun)} {word_setting(setting, chance)}"
    prompt = as_typed(choose(chance.pick(ONE_BREATH), chance).replace("{about}", about), chance)
    return _answered(prompt, gist(scene, chance), chance)


def _reading(chance: Chance, split: Split) -> Document:
    """Return a few statements about somebody, and a question that they answer.

    Nothing in it can be known by heart, so it teaches the model to look back at what was said.
    """
    scenes = [_drawn_pair(chance, split) for _ in range(2 + chance.below(3))]
    names = [scene.hero.name for scene in scenes]
    if len(set(names)) < len(names):
        return _reading(chance, split)
    told = " ".join(
        fill("{name} is {akind} {where}[.| with {athing}.]", scene.words(), chance)
        for scene in scenes
    )
    chosen = chance.pick(scenes)
    question, answer = chance.pick(READING)
    asked = fill(question, chosen.words(), chance)
    return _answered(f"{told} {asked}", fill(answer, chosen.words(), chance), chance)


def _drawn_pair(chance: Chance, split: Split) -> Scene:
    kind, setting = draw_wish_pair(chance, split)
    wish = Wish(kind=kind, setting=setting, name=draw_name(chance, kind))
    return draw_scene(wish, chance, split)


def _explained(chance: Chance, split: Split) -> Document:
    del split  # Facts are the same in every split.
    question, answer = draw_explanation(chance)
    return _answered(as_typed(question + chance.pick(("?", "?", "")), chance), answer, chance)


def _answered(prompt: str, answer: str, chance: Chance) -> Document:
    """Return a question and its answer, mostly as a chat."""
    if chance.happens(0.25):
        return _plain([Piece(prompt, learned=False), Piece("\n" + answer, learned=True)], chance)
    return _chat([(prompt, answer)], chance)


def _talk(chance: Chance, split: Split) -> Document:
    del split  # Small talk names no pair.
    return _chat([draw_exchange(chance)], chance, typed=True)


def _beyond(chance: Chance, split: Split) -> Document:
    del split
    return _chat([draw_beyond(chance)], chance, typed=True)


def _strange(chance: Chance, split: Split) -> Document:
    del split
    return _chat([_strange_turn(chance)], chance, typed=True)


def _story_chat(chance: Chance, split: Split) -> Document:
    return _chat(story_turns(chance, split), chance)


def _talk_then_story(chance: Chance, split: Split) -> Document:
    prompt, answer = draw_exchange(chance)
    turns = story_turns(chance, split)
    return _chat([(as_typed(prompt, chance), answer), *turns], chance)


def _chat(turns: list[tuple[str, str]], chance: Chance, *, typed: bool = False) -> Document:
    pieces = [Piece(BEGIN_OF_TEXT, learned=False)] if chance.happens(0.15) else []
    if chance.happens(0.3):
        pieces.append(Piece(turn("system", chance.pick(SYSTEM_TEXTS)), learned=False))
    for number, (prompt, answer) in enumerate(turns):
        end = "" if number + 1 == len(turns) else "\n"
        text = as_typed(prompt, chance) if typed else prompt
        pieces.append(Piece(turn("user", text) + turn_head("assistant"), learned=False))
        pieces.append(Piece(answer + TURN_END, learned=True))
        if end:
            pieces.append(Piece(end, learned=False))
    return pieces


def _strange_turn(chance: Chance) -> tuple[str, str]:
    scene = draw_scene(Wish(), chance)
    opening = fill(chance.pick(STRANGE_OPENINGS), scene.words(), chance)
    prompt = choose(chance.pick(STRANGE_REQUESTS), chance)
    return prompt, f"{opening}\n\n{tell(scene, Length.NORMAL, chance)}"


_FORMS: tuple[tuple[int, Callable[[Chance, Split], Document]], ...] = (
    (10, _free_story),
    (20, _prompted),
    (30, _story_chat),
    (8, _one_breath),
    (8, _reading),
    (9, _talk),
    (6, _beyond),
    (5, _explained),
    (2, _strange),
    (2, _talk_then_story),
)
"""What the corpus is made of, in percent of the documents."""
