"""The corpus generator's chance: equal seeds, equal choices, on every machine."""

from __future__ import annotations

import pytest

from tools.tiny_model.chance import Chance

PINNED_BITS = 13985457884964298213


def test_equal_seeds_give_equal_streams() -> None:
    """A seed names one stream."""
    first, second = Chance("seed"), Chance("seed")

    assert [first.bits() for _ in range(5)] == [second.bits() for _ in range(5)]


def test_the_stream_never_changes() -> None:
    """The first number is pinned: a change of it would be a change of every corpus."""
    assert Chance("maas-tiny-story").bits() == PINNED_BITS


def test_a_child_does_not_depend_on_what_was_drawn_before() -> None:
    """Document n is the same however many documents were made before it."""
    used = Chance("seed")
    used.bits()

    assert used.child("7").bits() == Chance("seed").child("7").bits()


def test_below_covers_its_range_evenly() -> None:
    """Each of ten numbers comes up about a tenth of the time."""
    chance = Chance("seed")
    counts = [0] * 10
    for _ in range(10_000):
        counts[chance.below(10)] += 1

    assert min(counts) > 850
    assert max(counts) < 1150


def test_shuffled_keeps_every_item() -> None:
    """A shuffle is a permutation and leaves its argument alone."""
    items = list(range(20))

    mixed = Chance("seed").shuffled(items)

    assert mixed != items
    assert sorted(mixed) == items == list(range(20))


def test_choosing_from_nothing_is_refused() -> None:
    """An empty table is a mistake, not a None."""
    with pytest.raises(ValueError, match="nothing to choose"):
        Chance("seed").pick(())
