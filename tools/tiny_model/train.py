"""Training: from a corpus file to weights, on the CPU.

It writes into the folder of the run only. The seed fixes the weights at the start and the order of
the batches; sums over threads may still differ in the last bit between machines.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from tools.tiny_model.batches import Batch, Encoded, encode, iter_batches, token_weights
from tools.tiny_model.corpus import read_corpus
from tools.tiny_model.network import Network, Shape
from tools.tiny_model.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        steps: Number of updates of the schedule of rates.
        until: Number of updates that are made; a stage may be cut short, for one with another end.
        resume: Whether to start from the weights of the run, not from new ones.
        flat: Share of the steps before the rates begin to fall to zero.
        longest: Documents of more tokens than this are left out; short ones, where names come up
            again at once, teach to look back much sooner than long ones.
        batch_tokens: Padded tokens in a batch, at most.
        batches: Batches of an update. A batch holds documents of one length, so an update takes
            more than one, to see short answers and long stories together.
        rate: Share of the peak rates that this stage reaches.
        matrix_rate: Peak learning rate of the matrices (Muon).
        vector_rate: Peak learning rate of the output matrix and the norms (AdamW).
        embedding_rate: Peak learning rate of the embedding (AdamW).
        warmup: Updates until the rates are at their peak.
        seed: Fixes the first weights and the order.
        threads: Threads of torch.
        bfloat16: Whether matrix products run in bfloat16; weights stay float32.
    """

    steps: int
    until: int
    resume: bool = False
    flat: float = 0.3
    longest: int = 1024
    batch_tokens: int = 2048
    batches: int = 2
    rate: float = 1.0
    matrix_rate: float = 0.01
    vector_rate: float = 0.002
    embedding_rate: float = 0.01
    warmup: int = 40
    seed: int = 1
    threads: int = 2
    bfloat16: bool = True


def train(folder: Path, recipe: Recipe, shape: Shape) -> Network:
    """Train on `folder`/corpus.jsonl and write weights.pt, shape.json and recipe.json there.

    The weights are also written on the way, so that a run that is cut short is not lost.
    """
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(mode=True)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    documents = [
        document
        for document in load_documents(folder / "corpus.jsonl", tokenizer, shape)
        if len(document.token_ids) <= recipe.longest
    ]
    network = load_network(folder).train() if recipe.resume else Network(shape)
    _say(f"{sum(p.numel() for p in network.parameters())} parameters, {len(documents)} documents")
    optimizers = _optimizers(network, recipe)
    (folder / "shape.json").write_text(json.dumps(asdict(shape)))
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe)))
    started = time.perf_counter()
    heavy = token_weights([tokenizer.decode([number]) for number in range(shape.vocabulary)])
    batches = _endless(documents, heavy, recipe)
    seen, recent = 0, np.zeros(2)
    for step in range(min(recipe.steps, recipe.until)):
        chosen = [next(batches) for _ in range(recipe.batches)]
        loss = _update(network, chosen, optimizers, _rate(step, recipe), recipe)
        seen += sum(batch.token_ids.size for batch in chosen)
        recent = loss if step == 0 else 0.95 * recent + 0.05 * loss
        if step % 25 == 0 or step + 1 == min(recipe.steps, recipe.until):
            torch.save(network.state_dict(), folder / "weights.pt")
            seconds = time.perf_counter() - started
            _say(
                f"step {step} loss {recent[0]:.4f}, of names and topics {recent[1]:.4f}, "
                f"tokens {seen}, seconds {seconds:.0f}"
            )
    return network


def load_network(folder: Path) -> Network:
    """Return the network that `train` wrote, in evaluation mode."""
    shape = Shape(**json.loads((folder / "shape.json").read_text()))
    network = Network(shape)
    network.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    network.eval()
    return network


def load_documents(path: Path, tokenizer: Tokenizer, shape: Shape) -> list[Encoded]:
    """Return the corpus of the run as token ids."""

    def encoder(text: str) -> list[int]:
        token_ids: list[int] = tokenizer.encode(text).ids
        return token_ids

    documents = read_corpus(path)
    return [encode(document, encoder, shape.context) for document in documents]


def document_losses(network: Network, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the cross entropies, in nats, and the weights of the learned tokens, each (n,)."""
    token_ids = torch.from_numpy(batch.token_ids)
    weights = torch.from_numpy(batch.weights)[:, 1:]
    learned = weights > 0
    stream = network(token_ids[:, :-1])
    # Only learned positions go through the output matrix: it is a tenth of the work.
    scores = network.logits(stream[learned])
    losses = functional.cross_entropy(scores.float(), token_ids[:, 1:][learned], reduction="none")
    return losses, weights[learned]


def _update(
    network: Network,
    batches: list[Batch],
    optimizers: list[torch.optim.Optimizer],
    rate: float,
    recipe: Recipe,
) -> NDArray[np.float64]:
    """Make one step; return the mean loss before it, of light and of heavy tokens, in nats."""
    weight = sum(float(batch.weights[:, 1:].sum()) for batch in batches)
    sums = np.zeros(4)
    for batch in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bfloat16):
            losses, weights = document_losses(network, batch)
        torch.autograd.backward((losses * weights).sum() / weight)
        heavy = weights > 1
        for place, chosen in enumerate((losses[~heavy], losses[heavy])):
            sums[2 * place : 2 * place + 2] += chosen.sum().item(), chosen.numel()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    means: NDArray[np.float64] = sums[::2] / np.maximum(sums[1::2], 1)
    return means


def _optimizers(network: Network, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices = [p for p in network.blocks.parameters() if p.ndim > 1]
    norms = [p for p in network.parameters() if p.ndim == 1]
    groups = [
        {"params": [*norms, network.head.weight], "lr": recipe.vector_rate},
        {"params": [network.embedding.weight], "lr": recipe.embedding_rate},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def _rate(step: int, recipe: Recipe) -> float:
    """Return the share of the peak rates: up in `warmup` steps, level, then down to zero."""
    up = min(1.0, (step + 1) / recipe.warmup)
    down = (recipe.steps - step) / ((1 - recipe.flat) * recipe.steps)
    return recipe.rate * min(up, down, 1.0)


def _endless(
    documents: list[Encoded], heavy: NDArray[np.float32], recipe: Recipe
) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from iter_batches(documents, heavy, recipe.batch_tokens, recipe.seed + epoch)
        epoch += 1


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
