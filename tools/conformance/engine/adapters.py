"""LoRA adapters."""

from __future__ import annotations

from services.worker.engine.base import AdapterUnusable
from tools.conformance.engine.check import ADAPTERS, Book
from tools.conformance.engine.harness import Harness, ask
from tools.conformance.verdict import Mismatch, expect, expect_equal

LORA = Book("adapters")
_TOKENS = 16


@LORA.check(ADAPTERS)
async def adapters_change_the_output_and_the_base_stays_as_it_was(harness: Harness) -> None:
    """Two adapters and the base model say three things, each the same thing again."""
    first, second = (harness.row.adapter(harness.folder, number) for number in (1, 2))
    base, _ = await harness.run(1, ask(_TOKENS))
    await harness.load_adapter(first)
    await harness.load_adapter(first)
    await harness.load_adapter(second)

    by_first, _ = await harness.run(2, ask(_TOKENS, adapter=first))
    by_second, _ = await harness.run(3, ask(_TOKENS, adapter=second))
    again, _ = await harness.run(4, ask(_TOKENS, adapter=first))
    plain, _ = await harness.run(5, ask(_TOKENS))

    outputs = {tuple(base), tuple(by_first), tuple(by_second)}
    expect_equal(len(outputs), 3, "different outputs of base and two adapters")
    harness.expect_same(again, by_first, "the first adapter again")
    harness.expect_same(plain, base, "the base model again")
    residents = set(harness.engine.load().resident_adapters)
    expect(residents >= {first.name, second.name}, "a loaded adapter is not among the residents")


@LORA.check(ADAPTERS)
async def adapters_in_one_batch_do_not_mix(harness: Harness) -> None:
    """Base model and adapter side by side say what they say alone."""
    adapter = harness.row.adapter(harness.folder, 1)
    await harness.load_adapter(adapter)
    base, _ = await harness.run(1, ask(_TOKENS))
    adapted, _ = await harness.run(2, ask(_TOKENS, adapter=adapter))

    harness.submit(3, ask(_TOKENS))
    harness.submit(4, ask(_TOKENS, adapter=adapter))
    await harness.until_ended(3, 4)

    harness.expect_same(harness.told[3].token_ids, base, "the base model in company")
    harness.expect_same(harness.told[4].token_ids, adapted, "the adapter in company")


@LORA.check(ADAPTERS)
async def an_unusable_adapter_is_refused_and_harms_nobody(harness: Harness) -> None:
    """What is no adapter is refused, and the engine goes on as before."""
    before, _ = await harness.run(1, ask(8))

    try:
        await harness.load_adapter(harness.row.unusable(harness.folder))
    except AdapterUnusable:
        pass
    else:
        raise Mismatch("a file that is no adapter was loaded")

    after, _ = await harness.run(2, ask(8))
    harness.expect_same(after, before, "the output behind the refusal")
