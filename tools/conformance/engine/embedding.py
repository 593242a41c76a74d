"""Embeddings beside generation."""

from __future__ import annotations

import asyncio

import numpy as np

from services.worker.engine.base import EmbeddingFailed
from tools.conformance.engine.check import EMBEDDINGS, Book
from tools.conformance.engine.harness import (
    LONG_PROMPT,
    PATIENCE_S,
    PROMPT,
    Harness,
    ask,
    eventually,
)
from tools.conformance.engine.rows import CONTEXT_LENGTH
from tools.conformance.verdict import Mismatch, expect, expect_equal

EMBEDDING = Book("embedding")


@EMBEDDING.check(EMBEDDINGS)
async def embeddings_have_length_1_and_depend_on_the_input_alone(harness: Harness) -> None:
    """Four inputs at once, one of them again alone: equal inputs, equal vectors."""
    inputs = [PROMPT, LONG_PROMPT, PROMPT, LONG_PROMPT[:60]]

    together = await harness.engine.embed(inputs)
    alone = await harness.engine.embed(inputs[1:2])

    expect(together.dtype == np.float32, "numbers are not float32")
    wanted = (4, harness.info.abilities.embedding_dimensions)
    expect_equal(together.shape, wanted, "shape")
    lengths = np.linalg.norm(together, axis=1)
    expect(np.allclose(lengths, 1, atol=1e-4), "a vector's length is not 1")
    expect(np.allclose(together[2], together[0], atol=1e-4), "equal inputs differ")
    expect(np.allclose(alone[0], together[1], atol=1e-3), "an input differs in company")
    near, far = together[1] @ together[3], together[1] @ together[0]
    expect(bool(near > far), "a prompt is nearer to another one than to its beginning")


@EMBEDDING.check(EMBEDDINGS)
async def embedding_does_not_disturb_generation(harness: Harness) -> None:
    """An output beside embeddings is what it is alone, and they come, too."""
    alone, _ = await harness.run(1, ask(40))
    harness.submit(2, ask(40))
    await harness.step()

    embedding = asyncio.ensure_future(harness.engine.embed([LONG_PROMPT] * 4))
    await harness.until_ended(2)
    await eventually(embedding.done, "embeddings beside an output")

    harness.expect_same(harness.told[2].token_ids, alone, "the output beside embeddings")
    expect_equal(len(embedding.result()), 4, "embeddings")


@EMBEDDING.check(EMBEDDINGS)
async def an_embedding_may_be_cancelled(harness: Harness) -> None:
    """Who cancels an embedding harms neither the next nor an output."""
    embedding = asyncio.ensure_future(harness.engine.embed([LONG_PROMPT] * 8))
    await asyncio.sleep(0)

    embedding.cancel()
    await asyncio.wait([embedding], timeout=PATIENCE_S)
    expect(embedding.cancelled(), "a cancelled embedding went on")

    again = await harness.engine.embed([PROMPT])
    token_ids, _ = await harness.run(1, ask(5))
    expect_equal(again.shape[0], 1, "embeddings")
    expect_equal(len(token_ids), 5, "tokens")


@EMBEDDING.check(EMBEDDINGS)
async def what_cannot_be_embedded_is_an_error(harness: Harness) -> None:
    """An input above the context length is refused, and the next one embedded."""
    try:
        await harness.engine.embed([(65,) * (CONTEXT_LENGTH + 1)])
    except EmbeddingFailed:
        pass
    else:
        raise Mismatch("an input above the context length was embedded")

    expect_equal((await harness.engine.embed([PROMPT])).shape[0], 1, "embeddings")
