"""What the gateway knows of adapters, and of what workers can do."""

from __future__ import annotations

import dataclasses

import pytest
from maas.common.v1.capabilities_pb2 import Capabilities

from libs.errors import NotFound, Unavailable
from services.gateway.domain import Adapter
from services.gateway.tables import Adapters, Worker, Workers

VERSION = "models/m/versions/1"


def adapter(name: str, project: str = "") -> Adapter:
    return Adapter(
        name=f"adapters/{name}", model_version=VERSION, path=name, digest="", project=project
    )


def listed(*adapters: Adapter) -> Adapters:
    table = Adapters()
    table.apply(adapters, (), is_snapshot=True, is_complete=True)
    return table


def worker(name: str, able: Capabilities | None, version: str = VERSION) -> Worker:
    return Worker(
        name=f"workers/{name}",
        endpoint="127.0.0.1:1",
        epoch=1,
        model_versions=frozenset({version}),
        capabilities=able,
    )


def test_a_project_finds_its_own_adapters_and_shared_ones() -> None:
    table = listed(adapter("shared"), adapter("own", "projects/p"), adapter("other", "projects/q"))

    assert table.get("adapters/shared", "projects/p") == adapter("shared")
    assert table.get("adapters/own", "projects/p").project == "projects/p"
    for name in ("adapters/other", "adapters/none"):
        with pytest.raises(NotFound) as caught:
            table.get(name, "projects/p")
        assert caught.value.metadata == {"resource": name}


def test_before_the_first_listing_nobody_is_told_that_there_is_none() -> None:
    table = Adapters()
    table.apply([adapter("a")], (), is_snapshot=True, is_complete=False)

    with pytest.raises(Unavailable):
        table.get("adapters/a", "projects/p")


def test_changes_apply_at_once() -> None:
    table = listed(adapter("a"))

    table.apply([adapter("b")], ["adapters/a"], is_snapshot=False, is_complete=False)

    assert table.get("adapters/b", "projects/p") == adapter("b")
    with pytest.raises(NotFound):
        table.get("adapters/a", "projects/p")


def test_what_a_new_listing_leaves_out_was_deleted_meanwhile() -> None:
    table = listed(adapter("a"), adapter("b"))

    table.apply([adapter("b")], (), is_snapshot=True, is_complete=False)
    assert table.get("adapters/a", "projects/p") == adapter("a")
    table.apply([], (), is_snapshot=True, is_complete=True)

    assert table.get("adapters/b", "projects/p") == adapter("b")
    with pytest.raises(NotFound):
        table.get("adapters/a", "projects/p")


def test_a_listing_that_broke_off_does_not_count() -> None:
    table = listed(adapter("a"))

    table.begin()
    table.apply([adapter("b")], (), is_snapshot=True, is_complete=False)
    # Its stream breaks, and b is deleted before the next one begins.
    table.begin()
    table.apply([adapter("a")], (), is_snapshot=True, is_complete=True)

    assert table.get("adapters/a", "projects/p") == adapter("a")
    with pytest.raises(NotFound):
        table.get("adapters/b", "projects/p")


def test_reasoning_may_come_from_any_worker_of_a_version() -> None:
    table = Workers()
    assert table.may_reason(VERSION)
    table.put(worker("a", Capabilities(chat=True)))
    table.put(worker("b", Capabilities(reasoning=True), version="models/n/versions/1"))
    assert not table.may_reason(VERSION)
    table.put(worker("c", Capabilities(reasoning=True)))
    assert table.may_reason(VERSION)
    table.drop("workers/c")
    assert not table.may_reason(VERSION)
    table.put(worker("d", None))
    assert table.may_reason(VERSION)


def test_a_version_can_do_what_all_of_its_workers_can() -> None:
    table = Workers()
    table.put(worker("a", Capabilities(chat=True, regex=True, max_outputs=4)))
    table.put(worker("b", Capabilities(chat=True, max_outputs=2)))
    table.put(worker("c", Capabilities(grammar=True), version="models/n/versions/1"))

    assert table.capabilities_of(VERSION) == Capabilities(chat=True, max_outputs=2)
    table.drop("workers/b")
    assert table.capabilities_of(VERSION) == Capabilities(chat=True, regex=True, max_outputs=4)
    table.put(dataclasses.replace(worker("a", Capabilities(min_p=True)), epoch=2))
    assert table.capabilities_of(VERSION) == Capabilities(min_p=True)


def test_nothing_is_known_of_a_version_whose_workers_do_not_say() -> None:
    table = Workers()
    assert table.capabilities_of(VERSION) is None
    table.put(worker("a", None))
    assert table.capabilities_of(VERSION) is None
    table.put(worker("b", Capabilities()))
    assert table.capabilities_of(VERSION) == Capabilities()
