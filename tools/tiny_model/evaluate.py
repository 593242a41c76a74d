"""The evaluation of the file that we ship: how well it keeps to what was asked.

Deterministic: prompts, seeds and held-out texts are fixed here. It reads the model file, writes
nothing, and needs numpy, `gguf` and `tokenizers`, but not torch.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.tiny_model.batches import Encoded, encode
from tools.tiny_model.chance import Chance
from tools.tiny_model.chat_format import TURN_END
from tools.tiny_model.corpus import EVALUATION_SEED, TRAIN_SEED, iter_documents
from tools.tiny_model.reference import ReferenceModel
from tools.tiny_model.sampling import Answer, Order, generate
from tools.tiny_model.scene import Split
from tools.tiny_model.topics import Topic, distinct_share, draw_topics, judge, overlap

TOKENS_MAX = 400
TEMPERATURE = 0.8
TOP_P = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much to measure.

    Attributes:
        topics: Topics of each split, each asked plainly and in a chat.
        seeds: Sampled stories for each of a few prompts.
        documents: Held-out documents for the perplexity.
        training_documents: Documents among which copies of stories are looked for.
    """

    topics: int = 40
    seeds: int = 16
    documents: int = 200
    training_documents: int = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One generated story and what it was to be about."""

    topic: Topic
    order: Order
    answer: Answer


def report(path: Path, plan: Plan) -> Iterator[str]:
    """Yield the lines of the report on the model at `path`."""
    model = ReferenceModel(path)
    yield f"parameters: {model.parameters}"
    for split in Split:
        value = perplexity(model, split, plan.documents)
        yield f"perplexity, {split.value} pairs, new seed: {value:.3f} per token"
    stories: list[str] = []
    for split in Split:
        for temperature in (0.0, TEMPERATURE):
            for chat in (False, True):
                cases = ask(model, split, plan.topics, temperature=temperature, chat=chat)
                stories += [case.answer.text for case in cases]
                form = "chat" if chat else "plain"
                yield f"{split.value} pairs, {form}, temperature {temperature}: {shares(cases)}"
    yield from _variety(model, plan)
    yield _copies(stories, plan)


def perplexity(model: ReferenceModel, split: Split, count: int) -> float:
    """Return the perplexity of learned tokens of new documents, per token."""
    loss, tokens = 0.0, 0
    for document in iter_documents(EVALUATION_SEED, count, split):
        encoded = encode(document, model.encode, model.context)
        loss += _surprise(model, encoded)
        tokens += int(encoded.learned[1:].sum())
    return float(np.exp(loss / tokens))


def ask(
    model: ReferenceModel, split: Split, count: int, *, temperature: float, chat: bool
) -> list[Case]:
    """Return a story for each of `count` topics of the split."""
    topics = draw_topics(EVALUATION_SEED, count, split)
    chance = Chance(f"{EVALUATION_SEED}/prompts/{split.value}/{chat}")
    orders = [
        Order(
            prompt=topic.prompt(chance, chat=chat),
            temperature=temperature,
            top_p=TOP_P,
            seed=number,
        )
        for number, topic in enumerate(topics)
    ]
    answers = generate(model, orders, TOKENS_MAX)
    return [
        Case(topic=topic, order=order, answer=answer)
        for topic, order, answer in zip(topics, orders, answers, strict=True)
    ]


def shares(cases: Sequence[Case]) -> str:
    """Return the shares of stories on topic, consistent and ended, as a line of text."""
    verdicts = [judge(case.topic, case.answer.text) for case in cases]
    count = len(cases)
    on_topic = sum(verdict.on_topic for verdict in verdicts)
    consistent = sum(verdict.consistent for verdict in verdicts)
    ended = sum(case.answer.ended for case in cases)
    length = sum(len(case.answer.token_ids) for case in cases) / count
    return (
        f"on topic {on_topic}/{count}, consistent {consistent}/{count}, "
        f"ended within {TOKENS_MAX} tokens {ended}/{count}, mean length {length:.0f} tokens"
    )


def _variety(model: ReferenceModel, plan: Plan) -> Iterator[str]:
    """Yield how different the sampled answers to one prompt are."""
    for topic in draw_topics(EVALUATION_SEED + "/variety", 3, Split.HELD_OUT):
        prompt = topic.prompt(Chance("variety"), chat=True)
        orders = [
            Order(prompt=prompt, temperature=TEMPERATURE, top_p=TOP_P, seed=seed)
            for seed in range(plan.seeds)
        ]
        texts = [answer.text for answer in generate(model, orders, TOKENS_MAX)]
        overlaps = [overlap(*pair) for pair in itertools.combinations(texts, 2)]
        yield (
            f"{plan.seeds} seeds of a {topic.kind.noun} {topic.setting.where}: "
            f"distinct {distinct_share(texts):.2f}, "
            f"mean overlap of runs of five words {np.mean(overlaps):.2f}"
        )


def _copies(stories: Sequence[str], plan: Plan) -> str:
    """Return how many of `stories` stand word for word in the training corpus."""
    wanted, found = {story.strip() for story in stories}, set[str]()
    for document in iter_documents(TRAIN_SEED, plan.training_documents):
        for piece in document:
            text = piece.text.removesuffix(TURN_END).strip()
            if piece.learned and text in wanted:
                found.add(text)
    return f"stories copied from the training corpus: {len(found)}/{len(wanted)}"


def _surprise(model: ReferenceModel, encoded: Encoded) -> float:
    """Return the summed negative log likelihood of the learned tokens, in nats."""
    ids = encoded.token_ids.astype(np.int64)[None]
    scores = model.forward(ids, model.new_cache(1, ids.shape[1]))[0, :-1].astype(np.float64)
    peak = scores.max(axis=-1)
    total = peak + np.log(np.exp(scores - peak[:, None]).sum(axis=-1))
    chosen = scores[np.arange(len(scores)), ids[0, 1:]]
    return float(((total - chosen) * encoded.learned[1:]).sum())


def write_report(path: Path, plan: Plan) -> None:
    """Write the report on the model at `path` to the standard output, line by line."""
    for line in report(path, plan):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
