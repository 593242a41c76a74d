"""Which slot a lane gets, and what of it the prefix cache already holds."""

from __future__ import annotations

import random

import numpy as np

from services.worker.engine.llamacpp_slots import (
    COPY_TOKENS_MIN,
    GAP_TOKENS_MIN,
    CacheKey,
    Place,
    SlotPool,
)

KEY: CacheKey = (b"tenant", "")
OTHER: CacheKey = (b"other", "")
LENGTH = 600


def ids_of(count: int, *, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.random.default_rng(seed).integers(0, 1000, count).astype(np.int32)


def pool_of(capacity: int = 4, *, keeps: bool = True) -> SlotPool:
    return SlotPool(capacity, LENGTH, keeps=keeps)


def enter(
    pool: SlotPool,
    ids: np.ndarray[tuple[int], np.dtype[np.int32]],
    *,
    key: CacheKey = KEY,
    reads: bool = True,
) -> Place:
    """Takes a slot and computes all that is missing."""
    place = pool.take(key, ids, reads=reads)
    pool.ids[place.slot, : len(ids)] = ids
    pool.lengths[place.slot] = len(ids)
    return place


def test_the_same_prompt_is_found_but_for_its_last_token() -> None:
    pool, ids = pool_of(), ids_of(50)
    first = enter(pool, ids)
    pool.give_back(first.slot, keeps=True)

    again = enter(pool, ids)

    assert first.common == 0
    assert again == Place(first.slot, first.slot, 49)


def test_another_key_never_finds_it() -> None:
    pool, ids = pool_of(), ids_of(50)
    pool.give_back(enter(pool, ids).slot, keeps=True)

    for key in (OTHER, (b"", ""), (b"tenant", "sha256:aa")):
        assert enter(pool, ids, key=key).common == 0


def test_who_does_not_read_finds_nothing_and_leaves_something() -> None:
    pool, ids = pool_of(capacity=2), ids_of(50)
    pool.give_back(enter(pool, ids).slot, keeps=True)

    unread = enter(pool, ids, reads=False)

    assert unread.common == 0
    pool.give_back(unread.slot, keeps=True)
    assert enter(pool, ids).common == 49


def test_a_prefix_in_a_slot_that_is_in_use_is_copied() -> None:
    pool, ids = pool_of(), ids_of(80)
    running = enter(pool, ids)
    follower = np.concatenate([ids[:60], ids_of(9, seed=1)])

    place = enter(pool, follower)

    assert place == Place(running.slot + 1, running.slot, 60)
    assert (pool.ids[place.slot, :69] == follower).all()


def test_a_short_prefix_is_not_worth_a_copy() -> None:
    pool, ids = pool_of(), ids_of(80)
    enter(pool, ids)
    follower = np.concatenate([ids[: COPY_TOKENS_MIN - 1], ids_of(9, seed=1)])

    assert enter(pool, follower).common == 0


def test_a_long_text_is_not_given_up_for_a_short_prefix_of_it() -> None:
    pool, ids = pool_of(), ids_of(300)
    long = enter(pool, ids)
    pool.give_back(long.slot, keeps=True)
    follower = np.concatenate([ids[:40], ids_of(30, seed=1)])

    place = enter(pool, follower)

    assert (place.source, place.common) == (long.slot, 40)
    assert place.slot != long.slot
    assert pool.lengths[long.slot] == 300


def test_a_slot_without_a_neighbour_in_use_is_taken_only_for_much() -> None:
    for length, is_taken in ((GAP_TOKENS_MIN - 10, False), (GAP_TOKENS_MIN + 10, True)):
        pool, ids = pool_of(capacity=5), ids_of(length)
        slots = [enter(pool, ids_of(5, seed=seed)).slot for seed in range(1, 5)]
        last = enter(pool, ids)
        for slot in (*slots[1:], last.slot):
            pool.give_back(slot, keeps=True)

        place = enter(pool, ids)

        assert (place.slot == last.slot) is is_taken
        assert place.common == length - 1


def test_the_slot_unused_for_longest_is_given_up_first() -> None:
    pool = pool_of(capacity=3)
    prompts = [ids_of(50, seed=seed) for seed in range(4)]
    for prompt in prompts:
        pool.give_back(enter(pool, prompt).slot, keeps=True)

    # The fourth one took the first one's.
    assert [enter(pool, prompt).common for prompt in prompts[1:]] == [49, 49, 49]


def test_what_failed_is_not_kept() -> None:
    pool, ids = pool_of(), ids_of(50)

    assert not pool.give_back(enter(pool, ids).slot, keeps=False)

    assert enter(pool, ids).common == 0


def test_without_a_cache_that_can_drop_ends_nothing_is_kept() -> None:
    pool, ids = pool_of(keeps=False), ids_of(50)

    assert not pool.give_back(enter(pool, ids).slot, keeps=True)

    assert pool.kept_tokens == 0
    assert enter(pool, ids).common == 0


def test_the_counts_stay_right_and_every_prefix_is_one_at_random() -> None:
    pool, rng = pool_of(), random.Random(7)  # noqa: S311 - no secret
    texts = [ids_of(120, seed=seed) for seed in range(3)]
    running: dict[int, int] = {}
    hits = 0
    for _ in range(400):
        if running and (not pool.free_count or rng.random() < 0.5):
            slot = rng.choice(sorted(running))
            pool.give_back(slot, keeps=rng.random() < 0.9)
            del running[slot]
        else:
            ids = np.concatenate([rng.choice(texts)[: rng.randint(1, 119)], ids_of(3, seed=99)])
            before = {slot: pool.ids[slot, : pool.lengths[slot]].copy() for slot in range(4)}
            place = pool.take(rng.choice([KEY, OTHER]), ids, reads=True)
            assert place.slot not in running
            assert place.common < len(ids)
            assert (before[place.source][: place.common] == ids[: place.common]).all()
            hits += place.common > 0
            pool.ids[place.slot, : len(ids)] = ids
            pool.lengths[place.slot] = running[place.slot] = len(ids)
        assert pool.lengths.sum() - pool.kept_tokens == sum(running.values())
        assert pool.free_count == 4 - len(running)
    assert hits > 50
