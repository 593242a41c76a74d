"""Affinity: equal bytes prefer one worker, while it has room and is not much busier."""

from __future__ import annotations

from collections import Counter

from tests.unit.services.scheduler.core.driver import Core, granted, the_grant

KEYS = [number.to_bytes(4, "big") for number in range(200)]


def _choices(core: Core) -> dict[bytes, str]:
    """The worker of each key when all are idle."""
    found = {}
    for key in KEYS:
        grant = the_grant(core.ask("probe", affinity=key))
        core.release(grant.slot_id)
        found[key] = grant.target.worker.removeprefix("workers/")
    return found


def _core(*names: str, capacity: int = 4) -> Core:
    core = Core()
    for name in names:
        core.register(name, capacity=capacity)
    return core


def test_equal_bytes_come_to_one_worker_and_others_spread() -> None:
    core = _core("a", "b", "c", "d")

    first = _choices(core)

    assert _choices(core) == first
    share = Counter(first.values())
    assert set(share) == {"a", "b", "c", "d"}
    assert max(share.values()) < 2 * len(KEYS) / len(share)


def test_the_choice_does_not_depend_on_who_came_first_or_when() -> None:
    assert _choices(_core("a", "b", "c")) == _choices(_core("c", "a", "b"))


def test_a_lost_worker_moves_its_own_keys_only() -> None:
    core = _core("a", "b", "c")
    before = _choices(core)

    core.lose("b")

    after = _choices(core)
    assert {key: name for key, name in before.items() if name != "b"} == {
        key: after[key] for key, name in before.items() if name != "b"
    }
    assert {after[key] for key, name in before.items() if name == "b"} == {"a", "c"}


def test_a_worker_that_is_much_busier_is_passed_over_for_the_next_of_the_key() -> None:
    core = _core("a", "b", "c")
    key = KEYS[0]
    preferred = _choices(core)[key]
    got = [granted(core.ask(f"e{number}", affinity=key))[f"e{number}"] for number in range(9)]

    # Three of four places are more than half ahead of an idle worker: then the next has its turn.
    assert got[:3] == [preferred] * 3
    second = got[3]
    assert second != preferred
    assert got[3:6] == [second] * 3
    assert {*got[6:]} - {preferred, second}


def test_a_full_worker_is_passed_over() -> None:
    core = _core("a", "b", capacity=1)
    key = KEYS[0]
    preferred = _choices(core)[key]
    other = "b" if preferred == "a" else "a"

    got = [granted(core.ask(f"e{number}", affinity=key)) for number in range(3)]

    assert got == [{"e0": preferred}, {"e1": other}, {}]


def test_an_excluded_worker_is_passed_over() -> None:
    core = _core("a", "b")
    key = KEYS[0]
    preferred = _choices(core)[key]

    got = granted(core.ask("e1", affinity=key, excluded=(preferred,)))

    assert got != {"e1": preferred}


def test_several_places_need_room_for_all_of_them() -> None:
    core = _core("a", "b")
    key = KEYS[0]
    preferred = _choices(core)[key]
    core.ask("e1", affinity=key)

    assert granted(core.ask("wide", affinity=key, places=4)) != {"wide": preferred}
    assert granted(core.ask("e2", affinity=key)) == {"e2": preferred}


def test_spares_are_nobodys_load() -> None:
    core = _core("a", "b", capacity=16)
    key = KEYS[0]
    preferred = _choices(core)[key]
    core.ask("e1", affinity=key, spares=[f"s{number}" for number in range(8)])

    assert granted(core.ask("e2", affinity=key)) == {"e2": preferred}


def test_without_affinity_idle_workers_take_turns() -> None:
    core = _core("a", "b")

    got = [granted(core.ask(f"e{number}"))[f"e{number}"] for number in range(4)]

    assert got == ["a", "b", "a", "b"]


def test_fallbacks_are_the_least_loaded_of_the_others() -> None:
    core = _core("a", "b", "c")
    key = KEYS[0]
    preferred = _choices(core)[key]
    busy, idle = (name for name in "abc" if name != preferred)
    core.report(busy, started=("x",))

    grant = the_grant(core.ask("e1", affinity=key))

    assert grant.target.worker == f"workers/{preferred}"
    assert [item.worker for item in grant.fallbacks] == [f"workers/{idle}", f"workers/{busy}"]
