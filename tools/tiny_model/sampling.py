"""Generation with the reference model: many prompts of one length at once, greedy or sampled.

Deterministic: sampled text depends on the seed of its row only, not on its neighbours.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tools.tiny_model.chat_format import END_OF_TEXT, SPECIAL_TOKENS, TURN_END

END_IDS = (SPECIAL_TOKENS.index(END_OF_TEXT), SPECIAL_TOKENS.index(TURN_END))
ROWS_MAX = 64

CacheType = TypeVar("CacheType")


class Model(Protocol[CacheType]):
    """What generation needs of a model; `reference.ReferenceModel` is one."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`."""

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of `token_ids`."""

    def new_cache(self, rows: int, length: int) -> CacheType:
        """Return an empty cache."""

    def forward(self, token_ids: NDArray[np.int64], cache: CacheType) -> NDArray[np.float32]:
        """Append tokens, (rows, count), and return logits, (rows, count, vocabulary)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One text to generate; temperature zero is greedy."""

    prompt: str
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was generated: the text, its tokens, and whether it ended by itself."""

    text: str
    token_ids: tuple[int, ...]
    ended: bool


def generate(model: Model[CacheType], orders: list[Order], tokens_max: int) -> list[Answer]:
    """Return an answer of at most `tokens_max` tokens for every order, in the same order."""
    encoded = [model.encode(order.prompt) for order in orders]
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, ids in enumerate(encoded):
        by_length[len(ids)].append(number)
    answers: dict[int, Answer] = {}
    # Rows of one length need no padding, and so no mask that could be wrong.
    for numbers in by_length.values():
        for start in range(0, len(numbers), ROWS_MAX):
            rows = numbers[start : start + ROWS_MAX]
            chosen = [orders[number] for number in rows]
            prompts = np.array([encoded[number] for number in rows], np.int64)
            made = _generate_rows(model, chosen, prompts, tokens_max)
            answers |= dict(zip(rows, made, strict=True))
    return [answers[number] for number in range(len(orders))]


def _generate_rows(
    model: Model[CacheType], orders: list[Order], prompts: NDArray[np.int64], tokens_max: int
) -> list[Answer]:
    cache = model.new_cache(len(orders), prompts.shape[1] + tokens_max)
    generators = [np.random.Generator(np.random.PCG64(order.seed)) for order in orders]
    made: list[list[int]] = [[] for _ in orders]
    ended = [False] * len(orders)
    scores = model.forward(prompts, cache)[:, -1]
    for _ in range(tokens_max):
        chosen = [
            pick_token(row, order, generator)
            for row, order, generator in zip(scores, orders, generators, strict=True)
        ]
        for number, token in enumerate(chosen):
            ended[number] = ended[number] or token in END_IDS
            if not ended[number]:
                made[number].append(token)
        if all(ended):
            break
        scores = model.forward(np.array(chosen, np.int64)[:, None], cache)[:, -1]
    return [
        Answer(text=model.decode(ids), token_ids=tuple(ids), ended=end)
        for ids, end in zip(made, ended, strict=True)
    ]


def pick_token(scores: NDArray[np.float32], order: Order, generator: np.random.Generator) -> int:
    """Return the next token; `scores` are logits, shape (vocabulary,).

    Top-p keeps the fewest likeliest tokens whose shares reach `top_p`, before the temperature, as
    llama.cpp does in its usual order of samplers.
    """
    if order.temperature <= 0:
        return int(scores.argmax())
    ranked = np.argsort(-scores, kind="stable")
    sorted_scores = scores[ranked].astype(np.float64)
    shares = _shares(sorted_scores)
    kept = int(np.searchsorted(np.cumsum(shares), order.top_p)) + 1
    warm = np.cumsum(_shares(sorted_scores[:kept] / order.temperature))
    # The last sum may fall short of one by a rounding error.
    place = min(int(np.searchsorted(warm, generator.random(), side="right")), len(warm) - 1)
    return int(ranked[place])


def _shares(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    raised = np.exp(scores - scores.max())
    shares: NDArray[np.float64] = raised / raised.sum()
    return shares
