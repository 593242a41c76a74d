"""Who our stories are about: kinds of characters, with what is true of each, and names.

Data only; the table of kinds is `tables/kinds.txt`. It never says anything that is not fit for a
small child.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.tiny_model.tables import read_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of character.

    Attributes:
        noun: The word that a prompt uses, without an article.
        home: Where one sleeps, a noun without an article.
        went: Choices of a verb in the past tense, for going somewhere.
        look: What one looks like, a noun phrase that follows "with".
        fact: Two true sentences about the kind in general (about tales, for the made-up kinds).
        pronoun: "he" or "she" where the kind decides it, else empty.
    """

    noun: str
    home: str
    went: str
    look: str
    fact: str
    pronoun: str = ""


def article(noun: str) -> str:
    """Return `noun` with "a" or "an" in front of it."""
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


def plural(noun: str) -> str:
    """Return the plural of a kind or a thing of our tables."""
    odd = {"mouse": "mice", "goose": "geese", "wolf": "wolves", "sheep": "sheep", "deer": "deer",
           "butterfly": "butterflies", "fairy": "fairies", "puppy": "puppies", "fish": "fish",
           "pony": "ponies", "berry": "berries", "scarf": "scarves", "octopus": "octopuses",
           "cherry": "cherries"}  # fmt: skip
    if noun in odd:
        return odd[noun]
    return noun + ("es" if noun.endswith(("x", "s", "ch", "sh")) else "s")


def _kind(row: list[str]) -> Kind:
    noun, home, went, look, fact, *pronoun = row
    return Kind(noun=noun, home=home, went=went, look=look, fact=fact, pronoun="".join(pronoun))


KINDS: tuple[Kind, ...] = tuple(_kind(row) for row in read_rows("kinds"))

HERO_NAMES: dict[str, tuple[str, ...]] = {
    "he": ("Pip", "Oscar", "Milo", "Jasper", "Felix", "Rufus", "Emil", "Bruno", "Ivo"),
    "she": ("Mina", "Lily", "Hazel", "Ruby", "Nora", "Maya", "Luna", "Willow", "Freya", "Zora"),
}
FRIEND_NAMES: dict[str, tuple[str, ...]] = {
    "he": ("Toby", "Finn", "Hugo", "Barney", "Otto", "Tom", "Ned", "Kofi", "Arun"),
    "she": ("Rosie", "Tilly", "Daisy", "Poppy", "Amara", "Suki", "Mabel", "Anya", "Lotta", "Bella",
            "Grace"),
}  # fmt: skip
"""Names by pronoun. Heroes and friends have different ones, so that a model that always takes the
likeliest name does not give both of them the same."""

BOY_NAMES: tuple[str, ...] = HERO_NAMES["he"] + FRIEND_NAMES["he"]
GIRL_NAMES: tuple[str, ...] = HERO_NAMES["she"] + FRIEND_NAMES["she"]
