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
from typing_extensions import override

from tools.tiny_model.batches import Encoded, encode
from tools.tiny_model.chance import Chance
from tools.tiny_model.chat_format import TURN_END, as_chat_prompt
from tools.tiny_model.corpus import EVALUATION_SEED, TRAIN_SEED, iter_documents
from tools.tiny_model.reference import ReferenceModel
from tools.tiny_model.requests import Request, draw_request
from tools.tiny_model.sampling import Answer, Order, generate
from tools.tiny_model.scene import Split
from tools.tiny_model.topics import Topic, distinct_share, draw_topics, judge, overlap

TOKENS_MAX = 400
TEMPERATURE = 0.8
_FURTHER_WISHES = {
    "thing": "a thing",
    "friend_kind": "a friend",
    "time": "a weather or season",
    "name": "the hero's name",
}
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
    training_documents: int = 60_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Prompts that are reported together."""

    split: Split
    temperature: float
    chat: bool

    @override
    def __str__(self) -> str:
        form = "chat" if self.chat else "plain"
        return f"{self.split.value} pairs, {form}, temperature {self.temperature}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One prompt, what its story is to be about, and the group that it counts for."""

    group: Group
    topic: Topic
    order: Order


def report(path: Path, plan: Plan) -> Iterator[str]:
    """Yield the lines of the report on the model at `path`."""
    model = ReferenceModel(path)
    yield f"parameters: {model.parameters}"
    for split in Split:
        value = perplexity(model, split, plan.documents)
        yield f"perplexity of new documents, {split.value} pairs: {value:.3f} per learned token"
    groups = [
        Group(split=split, temperature=temperature, chat=chat)
        for split in Split
        for temperature in (0.0, TEMPERATURE)
        for chat in (False, True)
    ]
    questions = [question for group in groups for question in ask(group, plan.topics)]
    # All at once: rows of one length share the work, whatever group they count for.
    answers = generate(model, [question.order for question in questions], TOKENS_MAX)
    asked = list(zip(questions, answers, strict=True))
    for group in groups:
        members = [(question, answer) for question, answer in asked if question.group == group]
        yield f"{group}: {shares(members)}"
    yield from _further_wishes(model, plan)
    yield from _variety(model, plan)
    yield _copies([answer.text for answer in answers], plan)


def perplexity(model: ReferenceModel, split: Split, count: int) -> float:
    """Return the perplexity of learned tokens of new documents, per token."""
    loss, tokens = 0.0, 0
    for document in iter_documents(EVALUATION_SEED, count, split):
        encoded = encode(document, model.encode, model.context)
        loss += _surprise(model, encoded)
        tokens += int(encoded.learned[1:].sum())
    return float(np.exp(loss / tokens))


def ask(group: Group, count: int) -> list[Question]:
    """Return a question for each of `count` topics of the group's split."""
    chance = Chance(f"{EVALUATION_SEED}/prompts/{group.split.value}/{group.chat}")
    return [
        Question(
            group=group,
            topic=topic,
            order=Order(
                prompt=topic.prompt(chance, chat=group.chat),
                temperature=group.temperature,
                top_p=TOP_P,
                seed=number,
            ),
        )
        for number, topic in enumerate(draw_topics(EVALUATION_SEED, count, group.split))
    ]


def shares(asked: Sequence[tuple[Question, Answer]]) -> str:
    """Return the shares of stories on topic, consistent and ended, as a line of text."""
    verdicts = [judge(question.topic, answer.text) for question, answer in asked]
    count = len(asked)
    on_topic = sum(verdict.on_topic for verdict in verdicts)
    consistent = sum(verdict.consistent for verdict in verdicts)
    ended = sum(answer.ended for _, answer in asked)
    length = sum(len(answer.token_ids) for _, answer in asked) / count
    return (
        f"on topic {on_topic}/{count}, consistent {consistent}/{count}, "
        f"ended within {TOKENS_MAX} tokens {ended}/{count}, mean length {length:.0f} tokens"
    )


def _further_wishes(model: ReferenceModel, plan: Plan) -> Iterator[str]:
    """Yield how often one more wish of a prompt is granted, greedy and in a chat."""
    for part, label in _FURTHER_WISHES.items():
        requests = itertools.islice(_requests_with(part), plan.topics)
        asked = [(as_chat_prompt(request.text), noun) for request, noun in requests]
        orders = [Order(prompt=prompt) for prompt, _ in asked]
        answers = generate(model, orders, TOKENS_MAX)
        granted = sum(noun in answer.text for (_, noun), answer in zip(asked, answers, strict=True))
        yield f"prompts that also name {label}: it is in {granted}/{len(asked)} stories"


def _requests_with(part: str) -> Iterator[tuple[Request, str]]:
    """Yield new requests that wish for `part`, each with the word that the story should have."""
    root = Chance(f"{EVALUATION_SEED}/wishes")
    for number in itertools.count():
        request = draw_request(root.child(str(number)))
        wished = getattr(request.wish, part)
        if wished is not None and request.wish.kind is not None:
            yield request, wished if isinstance(wished, str) else wished.noun


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
