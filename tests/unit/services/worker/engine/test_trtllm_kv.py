"""Events of TensorRT-LLM's KV cache, told in our words."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import count

import pytest

from services.worker.engine.kv_events import (
    KvCleared,
    KvEvent,
    KvRemoved,
    KvStored,
    KvTier,
    chain,
)
from services.worker.engine.trtllm_kv import KvTranslator

BLOCK = 4
WINDOW = 1000
A, B, C = [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]
NAME_A = chain(None, A)
NAME_AB = chain(NAME_A, B)
NAME_ABC = chain(NAME_AB, C)
HUGE = 2**64 - 5

Record = dict[str, object]


class Rank:
    """Writes events as TensorRT-LLM does."""

    def __init__(self, number: int | None = None) -> None:
        self.ids = count()
        self.number = number

    def event(self, data: Record, window: int = WINDOW) -> Record:
        record: Record = {"event_id": next(self.ids), "data": data, "window_size": window}
        return record if self.number is None else {**record, "attention_dp_rank": self.number}

    def created(self, window: int = WINDOW) -> Record:
        return self.event({"type": "created", "num_blocks_per_cache_level": [10, 0]}, window)

    def stored(
        self, parent: int | None, *blocks: tuple[int, Sequence[int]], level: int = 0
    ) -> Record:
        return self.event(
            {
                "type": "stored",
                "parent_hash": parent,
                "blocks": [block(name, tokens, level) for name, tokens in blocks],
            }
        )

    def removed(self, *hashes: int) -> Record:
        return self.event({"type": "removed", "block_hashes": list(hashes)})

    def moved(self, block_hash: int, old: int, new: int) -> Record:
        level = {"type": "event_diff", "new_value": new, "old_value": old}
        data: Record = {"type": "updated", "block_hash": block_hash, "cache_level": level}
        return self.event({**data, "priority": None})


def block(block_hash: int, tokens: Sequence[int], level: int = 0) -> Record:
    words = [{"type": "unique_token", "token_id": one, "token_extra_id": 0} for one in tokens]
    return {
        "type": "stored_block",
        "block_hash": block_hash,
        "tokens": words,
        "cache_level": level,
        "priority": 35,
    }


@pytest.fixture
def rank() -> Rank:
    return Rank()


@pytest.fixture
def translator() -> KvTranslator:
    return KvTranslator(BLOCK)


def test_blocks_are_named_by_their_tokens_and_all_before(
    rank: Rank, translator: KvTranslator
) -> None:
    told = translator.translate(
        [rank.created(), rank.stored(None, (HUGE, A), (8, B)), rank.stored(8, (9, C))]
    )

    assert told == [KvStored((NAME_A, NAME_AB), None), KvStored((NAME_ABC,), NAME_AB)]


def test_hashes_are_the_same_with_and_without_a_sign(rank: Rank, translator: KvTranslator) -> None:
    translator.translate([rank.stored(None, (HUGE, A))])

    assert translator.translate([rank.removed(HUGE - 2**64)]) == [KvRemoved((NAME_A,))]


def test_equal_blocks_of_two_salts_are_there_until_the_last_goes(
    rank: Rank, translator: KvTranslator
) -> None:
    stored = translator.translate([rank.stored(None, (7, A)), rank.stored(None, (8, A))])
    first = translator.translate([rank.removed(7)])
    last = translator.translate([rank.removed(8)])

    assert stored == [KvStored((NAME_A,), None)]
    assert first == []
    assert last == [KvRemoved((NAME_A,))]


def test_a_run_that_meets_known_blocks_goes_on_behind_them(
    rank: Rank, translator: KvTranslator
) -> None:
    translator.translate([rank.stored(None, (7, A), (8, B))])

    told = translator.translate([rank.stored(None, (17, A), (18, B), (19, C))])

    assert told == [KvStored((NAME_ABC,), NAME_AB)]


def test_blocks_that_are_not_full_are_left_out_with_their_removal(
    rank: Rank, translator: KvTranslator
) -> None:
    told = translator.translate([rank.stored(None, (7, A), (8, B[:3])), rank.stored(8, (9, C))])

    assert told == [KvStored((NAME_A,), None)]
    assert translator.translate([rank.removed(8, 9, 7)]) == [KvRemoved((NAME_A,))]


def test_blocks_with_more_than_text_are_left_out(rank: Rank, translator: KvTranslator) -> None:
    image = block(7, A)
    image["mm_keys"] = [{"type": "mm_key", "hash": "ab"}]
    data: Record = {"type": "stored", "parent_hash": None, "blocks": [image]}

    assert translator.translate([rank.event(data)]) == []


def test_what_moves_to_the_host_is_told_again(rank: Rank, translator: KvTranslator) -> None:
    translator.translate([rank.stored(None, (7, A), (8, B))])

    assert translator.translate([rank.moved(8, 0, 1)]) == [
        KvStored((NAME_AB,), NAME_A, KvTier.HOST)
    ]
    assert translator.translate([rank.moved(8, 1, 0)]) == [KvStored((NAME_AB,), NAME_A)]
    assert translator.translate([rank.moved(8, 0, 0), rank.moved(99, 0, 1)]) == []


def test_a_block_lies_where_its_best_copy_does(rank: Rank, translator: KvTranslator) -> None:
    translator.translate([rank.stored(None, (7, A)), rank.stored(None, (8, A))])

    assert translator.translate([rank.moved(7, 0, 1)]) == []
    assert translator.translate([rank.removed(8)]) == [KvStored((NAME_A,), None, KvTier.HOST)]


def test_a_lost_event_makes_all_forgotten(rank: Rank, translator: KvTranslator) -> None:
    translator.translate([rank.stored(None, (7, A))])
    next(rank.ids)

    told = translator.translate([rank.stored(None, (8, A)), rank.removed(7)])

    assert told == [KvCleared(), KvStored((NAME_A,), None)]


@pytest.mark.parametrize(
    "data",
    [
        "text",
        {"type": "stored", "parent_hash": None, "blocks": 5},
        {"type": "stored", "parent_hash": "x", "blocks": []},
        {"type": "removed"},
        {"type": "removed", "block_hashes": ["x"]},
        {"type": "stored", "parent_hash": None, "blocks": [{"tokens": [1, 2, 3, 4]}]},
        {"type": "stored", "parent_hash": None, "blocks": [block(9, [1, 2, 3, 1 << 31])]},
    ],
)
def test_what_cannot_be_read_makes_all_forgotten(
    rank: Rank, translator: KvTranslator, data: Record
) -> None:
    translator.translate([rank.stored(None, (7, A))])

    assert translator.translate([rank.event(data)])[-1] == KvCleared()
    assert translator.translate([rank.stored(None, (8, A))]) == [KvStored((NAME_A,), None)]


def test_unknown_kinds_of_events_say_nothing(rank: Rank, translator: KvTranslator) -> None:
    assert translator.translate([rank.event({"type": "something new"})]) == []


def test_only_the_largest_window_counts(rank: Rank, translator: KvTranslator) -> None:
    created = [rank.created(64), rank.created()]
    stored = rank.stored(None, (7, A))

    told = translator.translate([*created, stored])
    small = translator.translate([{**stored, "window_size": 64}])
    gone = rank.removed(7)
    kept = translator.translate([{**gone, "window_size": 64}])

    assert told == [KvStored((NAME_A,), None)]
    assert small == kept == []
    assert translator.translate([gone]) == [KvRemoved((NAME_A,))]


def test_ranks_count_for_themselves_and_name_alike(translator: KvTranslator) -> None:
    first, second = Rank(0), Rank(1)
    translator.translate([first.created(), second.created()])

    told = translator.translate(
        [first.stored(None, (7, A)), second.stored(None, (7, A)), first.removed(7)]
    )

    assert told == [KvStored((NAME_A,), None)]
    assert translator.translate([second.removed(7)]) == [KvRemoved((NAME_A,))]


def test_too_many_blocks_are_forgotten() -> None:
    rank, translator = Rank(), KvTranslator(BLOCK, blocks_max=2)

    told = translator.translate([rank.stored(None, (7, A), (8, B), (9, C))])

    assert told[-1] == KvCleared()
    assert translator.translate([rank.removed(7, 8, 9)]) == []


def test_whatever_happens_what_is_told_is_what_is_there() -> None:
    """Random prompts of a few tokens under salts, stored and removed as a tree of blocks."""
    chance = random.Random(7)  # noqa: S311 - a test that can be repeated
    rank, translator = Rank(), KvTranslator(2)
    there: dict[int, tuple[int | None, int]] = {}
    believed: set[int] = set()
    for number in range(1500):
        leaves = set(there) - {parent for parent, _ in there.values()}
        if leaves and chance.random() < 0.45:
            gone = chance.choice(sorted(leaves))
            del there[gone]
            record = rank.removed(gone)
        else:
            parent = chance.choice([None, *there])
            before = None if parent is None else there[parent][1]
            tokens = [chance.randrange(2), chance.randrange(2)]
            there[number] = (parent, chain(before, tokens))
            record = rank.stored(parent, (number, tokens))
        apply(believed, translator.translate([record]))
        assert believed == {name for _, name in there.values()}


def apply(believed: set[int], events: Sequence[KvEvent]) -> None:
    for event in events:
        if isinstance(event, KvStored):
            believed.update(event.hashes)
        elif isinstance(event, KvRemoved):
            believed.difference_update(event.hashes)
        else:
            believed.clear()
