"""Small talk, and the honest answer to what this model can not do.

Pure but for its tables, `small_talk.txt`, `beyond.txt` and `words.txt`. Nothing here pretends to
know more than short stories and a few simple facts.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.tiny_model.chance import Chance
from tools.tiny_model.tables import read_blocks, read_lines, with_words
from tools.tiny_model.wording import choose


@dataclass(frozen=True, slots=True)
class Exchange:
    """Ways to say something, and ways to answer it; both in the notation of `wording`."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]


def _exchange(block: list[list[str]]) -> Exchange:
    prompts, answers = block
    return Exchange(tuple(prompts), tuple(with_words(answer) for answer in answers))


SMALL_TALK: tuple[Exchange, ...] = tuple(_exchange(block) for block in read_blocks("small_talk"))
BEYOND: tuple[str, ...] = tuple(with_words(line) for line in read_lines("beyond"))
BEYOND_ANSWERS: tuple[str, ...] = tuple(
    with_words(answer)
    for answer in (
        "{self}. That is beyond me. {hint}",
        "I am sorry, I do not know that. {self}. {hint}",
        "{self}, but I can not do that. {hint}",
    )
)
STRANGE_REQUESTS: tuple[str, ...] = tuple(
    with_words(request.replace("{a_strange}", "[a|an|the] {strange_topic}"))
    for request in (
        "[tell me|write|i want|can you tell me|please tell me] a [short |] story about {a_strange}",
        "a story about [a|the] {strange_topic}",
        "story about [a|two] {strange_topic}",
        "[tell me|write] a story about [a|the] {strange_topic} and [a|the] {strange_topic}",
    )
)
STRANGE_OPENINGS: tuple[str, ...] = (
    "I do not know much about that, so here is a story about {akind} {where}.",
    "That is new to me. I can tell you about {akind} {where} instead.",
)


def draw_exchange(chance: Chance) -> tuple[str, str]:
    """Return a prompt of small talk and an answer to it."""
    exchange = chance.pick(SMALL_TALK)
    return (
        choose(chance.pick(exchange.prompts), chance),
        choose(chance.pick(exchange.answers), chance).strip(),
    )


def draw_beyond(chance: Chance) -> tuple[str, str]:
    """Return a prompt that is beyond this model and an answer that says so."""
    return choose(chance.pick(BEYOND), chance), choose(chance.pick(BEYOND_ANSWERS), chance)
