"""Documents as token ids, and the order in which training sees them.

Pure but for reading what it is given: the same documents and seed give the same batches. Documents
are never cut and never joined: a batch holds documents of about the same length, padded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tools.tiny_model.cast import BOY_NAMES, GIRL_NAMES, KINDS
from tools.tiny_model.conversations import Document
from tools.tiny_model.settings import SETTINGS
from tools.tiny_model.things import THINGS

EMPHASIS = 3.0
"""How much more a token counts that says who, where or what."""

_NEIGHBOURHOOD = 4096
"""Documents that are sorted by length together; small enough to leave the order random."""


class Encoder(Protocol):
    """Turns a text, special tokens included, into token ids."""

    def __call__(self, text: str) -> list[int]:
        """Return the ids of `text`."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document as ids (int16, shape (n,)) and which of them are learned (bool, shape (n,))."""

    token_ids: NDArray[np.int16]
    learned: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded documents.

    Attributes:
        token_ids: int64, shape (documents, length); the padding is zero.
        weights: float32, same shape: how much the loss of predicting the token at t counts.
    """

    token_ids: NDArray[np.int64]
    weights: NDArray[np.float32]


def encode(document: Document, encoder: Encoder, limit: int) -> Encoded:
    """Return `document` as ids, cut after `limit` tokens.

    Pieces are encoded one by one. That is the same as encoding the whole, because every piece
    begins or ends at a special token or at a line break, where the pre-tokenizer cuts anyway.
    """
    token_ids: list[int] = []
    learned: list[bool] = []
    for piece in document:
        ids = encoder(piece.text)
        token_ids += ids
        learned += [piece.learned] * len(ids)
    return Encoded(np.array(token_ids[:limit], np.int16), np.array(learned[:limit], np.bool_))


def iter_batches(
    documents: list[Encoded], heavy: NDArray[np.float32], tokens: int, seed: int
) -> Iterator[Batch]:
    """Yield batches of at most `tokens` padded tokens, each document once, ordered by `seed`."""
    generator = np.random.Generator(np.random.PCG64(seed))
    order = generator.permutation(len(documents))
    for start in range(0, len(order), _NEIGHBOURHOOD):
        near = sorted(order[start : start + _NEIGHBOURHOOD], key=lambda n: len(_ids(documents, n)))
        groups = list(_groups(near, documents, tokens))
        for group in generator.permutation(len(groups)):
            yield pad([documents[n] for n in groups[group]], heavy)


def pad(documents: Iterable[Encoded], heavy: NDArray[np.float32]) -> Batch:
    """Return one batch with a row for each document; `heavy` has a weight for every token."""
    rows = list(documents)
    length = max(len(row.token_ids) for row in rows)
    token_ids = np.zeros((len(rows), length), np.int64)
    weights = np.zeros((len(rows), length), np.float32)
    for number, row in enumerate(rows):
        token_ids[number, : len(row.token_ids)] = row.token_ids
        weights[number, : len(row.learned)] = np.where(row.learned, heavy[row.token_ids], 0)
    return Batch(token_ids, weights)


def token_weights(texts: Sequence[str]) -> NDArray[np.float32]:
    """Return how much each token counts in the loss; `texts` has the text of every token.

    Names, characters, places, things and pronouns are one token in ten but all of what a story has
    to keep straight; everything else follows from the templates. So they count more.
    """
    words = {kind.noun for kind in KINDS} | {setting.noun for setting in SETTINGS}
    words |= {thing.noun for thing in THINGS} | {*BOY_NAMES, *GIRL_NAMES}
    words |= {"he", "him", "his", "she", "her"}
    heavy = [text.strip() in words or text.strip().lower() in words for text in texts]
    return np.where(heavy, EMPHASIS, 1).astype(np.float32)


def _ids(documents: list[Encoded], number: int) -> NDArray[np.int16]:
    return documents[number].token_ids


def _groups(near: list[int], documents: list[Encoded], tokens: int) -> Iterator[list[int]]:
    group: list[int] = []
    for number in near:
        # Lengths rise, so the newest document sets the padded length of its group.
        if group and (len(group) + 1) * len(_ids(documents, number)) > tokens:
            yield group
            group = []
        group.append(number)
    if group:
        yield group
