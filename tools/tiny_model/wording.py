"""The notation of our templates, and how one becomes text.

`[a|b|c]` is replaced by one of its choices, which may be empty and may nest; `{slot}` is replaced
by a word of the scene. Pure: it takes the words and the chance, and returns text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from tools.tiny_model.chance import Chance

_INNERMOST = re.compile(r"\[([^\[\]]*)\]")
_SPACES = re.compile(r" {2,}")
_SENTENCE_START = re.compile(r"(^\"?|[.!?] \"?|\.\" \"?|\n\"?)([a-z])")
_SLOT = re.compile(r"\{([a-z_]+)\}")


def choose(template: str, chance: Chance) -> str:
    """Return `template` with each `[a|b]` replaced by one of its choices, innermost first."""
    while True:
        chosen = _INNERMOST.sub(lambda match: chance.pick(match.group(1).split("|")), template)
        if chosen == template:
            return chosen
        template = chosen


def slots(template: str) -> frozenset[str]:
    """Return the names of the slots that `template` may use, whatever is chosen."""
    return frozenset(_SLOT.findall(template))


def fill(template: str, words: Mapping[str, str], chance: Chance) -> str:
    """Return the finished text of one template.

    Args:
        template: Text in the notation of this module.
        words: A word for every slot of the template; words may hold choices, but no slots.
        chance: Decides between the choices.

    Raises:
        KeyError: If the template uses a slot that `words` does not have.
    """
    filled = _SLOT.sub(lambda match: words[match.group(1)], choose(template, chance))
    return tidy(choose(filled, chance))


def tidy(text: str) -> str:
    """Return `text` with single spaces and a capital at the start of each sentence.

    What follows `!"` and `?"` keeps its case, because there the sentence may go on ("he said").
    """
    text = _SPACES.sub(" ", text).replace(" .", ".").replace(" ,", ",").strip()
    return _SENTENCE_START.sub(lambda match: match.group(1) + match.group(2).upper(), text)
