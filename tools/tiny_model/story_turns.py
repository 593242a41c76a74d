"""Chats about a story: the request, and what a user says when the story is told.

Pure: chance comes in as an argument. What comes back are prompts and answers, without tokens of
the chat format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tools.tiny_model.chance import Chance
from tools.tiny_model.phrases import (
    ABOUT_FRIEND,
    ABOUT_HERO,
    ABOUT_THING,
    AGAIN,
    GOODBYE,
    LEADS,
    LONGER,
    SHORTER,
    THANKS,
)
from tools.tiny_model.requests import Request, as_typed, draw_request
from tools.tiny_model.scene import Scene, Split, Wish, draw_scene, may_meet
from tools.tiny_model.small_talk import draw_beyond
from tools.tiny_model.story import Length, gist, tell, tell_with
from tools.tiny_model.wording import choose, fill

TURNS_MAX = 4

FollowUp = tuple[str, str, Scene, str]
"""What the user says next, the answer, and the scene and the story that it leaves."""


def prompted_story(request: Request, chance: Chance, split: Split) -> tuple[Scene, str]:
    """Return a scene that grants the request, and its story with all required words."""
    while True:
        scene = draw_scene(request.wish, chance, split)
        story = tell_with(scene, request.length, request.required, chance)
        # A kind or setting in the story that the prompt does not name is fine; a miss is not.
        if story is not None:
            return scene, story
        if request.length is Length.SHORT:
            request = replace(request, length=Length.NORMAL)


def story_turns(chance: Chance, split: Split) -> list[tuple[str, str]]:
    """Return a chat about a story, one to four pairs of prompt and answer."""
    request = draw_request(chance, split)
    scene, story = prompted_story(request, chance, split)
    turns = [(request.text, chance.pick(LEADS) + story)]
    while len(turns) < TURNS_MAX and chance.happens(0.45):
        prompt, answer, scene, story = _follow_up(scene, story, chance)
        turns.append((as_typed(prompt, chance), answer))
    return turns


def _follow_up(scene: Scene, story: str, chance: Chance) -> FollowUp:
    """Return what the user says next, the answer, and the scene and story that it leaves."""
    return chance.weigh(_FOLLOW_UPS)(scene, story, chance)


def _another(scene: Scene, story: str, chance: Chance) -> FollowUp:
    del story
    prompt = choose(chance.pick(AGAIN), chance)
    if chance.happens(0.5) and may_meet(scene.hero.kind, (scene.setting,), Split.TRAIN):
        scene = draw_scene(Wish(kind=scene.hero.kind, setting=scene.setting), chance)
        story = tell(scene, Length.NORMAL, chance)
        return prompt, story, scene, story
    request = draw_request(chance)
    scene, story = prompted_story(request, chance, Split.TRAIN)
    return (prompt if request.wish == Wish() else request.text), story, scene, story


def _shorter(scene: Scene, story: str, chance: Chance) -> FollowUp:
    return choose(chance.pick(SHORTER), chance), gist(scene, chance), scene, story


def _longer(scene: Scene, story: str, chance: Chance) -> FollowUp:
    story = tell(scene, Length.LONG, chance)
    return choose(chance.pick(LONGER), chance), story, scene, story


def _asked(scene: Scene, story: str, chance: Chance) -> FollowUp:
    prompt, answer = _question(scene, story, chance)
    return prompt, answer, scene, story


def _changed_subject(scene: Scene, story: str, chance: Chance) -> FollowUp:
    prompt, answer = draw_beyond(chance) if chance.happens(0.25) else _thanks(chance)
    return prompt, answer, scene, story


def _thanks(chance: Chance) -> tuple[str, str]:
    prompt, answer = THANKS if chance.happens(0.7) else GOODBYE
    return choose(prompt, chance), choose(answer, chance).strip()


def _question(scene: Scene, story: str, chance: Chance) -> tuple[str, str]:
    """Return a question about the story just told, and the answer that follows from the scene."""
    choices = list(ABOUT_HERO)
    if scene.friend.name in story and scene.friend.kind.noun in story:
        choices += ABOUT_FRIEND
    if f"{scene.look} {scene.thing.noun}" in story:
        choices += ABOUT_THING
    question, answer = chance.pick(choices)
    prompt = fill(question, scene.words(), chance)
    return prompt + chance.pick(("?", "")), fill(answer, scene.words(), chance)


_FOLLOW_UPS: tuple[tuple[int, Callable[[Scene, str, Chance], FollowUp]], ...] = (
    (5, _another),
    (3, _shorter),
    (1, _longer),
    (7, _asked),
    (4, _changed_subject),
)
