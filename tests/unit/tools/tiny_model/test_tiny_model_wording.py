"""The template notation: choices, slots, capitals."""

from __future__ import annotations

import pytest

from tools.tiny_model.chance import Chance
from tools.tiny_model.wording import choose, fill, slots, tidy


def test_choices_may_nest() -> None:
    """The inner choice is made before the outer one."""
    seen = {choose("[a|b[c|d]]", Chance(str(seed))) for seed in range(50)}

    assert seen == {"a", "bc", "bd"}


def test_an_empty_choice_leaves_no_double_space() -> None:
    """`[x|]` may vanish."""
    seen = {fill("one [x|] two.", {}, Chance(str(seed))) for seed in range(20)}

    assert seen == {"One x two.", "One two."}


def test_a_word_may_bring_choices_of_its_own() -> None:
    """Words are filled in first, then their choices are made."""
    seen = {fill("{went}", {"went": "[ran|walked]"}, Chance(str(seed))) for seed in range(20)}

    assert seen == {"Ran", "Walked"}


def test_a_missing_word_is_refused() -> None:
    """A template never leaves a slot in the text."""
    with pytest.raises(KeyError):
        fill("{nobody}", {}, Chance("seed"))


def test_slots_are_found_in_all_choices() -> None:
    """A slot counts even in a choice that may not be taken."""
    assert slots("{a} [x|{b}]") == {"a", "b"}


@pytest.mark.parametrize(
    ("rough", "tidied"),
    [
        ("he ran. she ran.", "He ran. She ran."),
        ('"hello," he said.', '"Hello," he said.'),
        ('"stop!" he said. he ran.', '"Stop!" he said. He ran.'),
        ('"i am here." he smiled.', '"I am here." He smiled.'),
        ("too  many   spaces .", "Too many spaces."),
    ],
)
def test_sentences_begin_with_a_capital(rough: str, tidied: str) -> None:
    """Only a sentence that has ended is followed by a capital."""
    assert tidy(rough) == tidied
