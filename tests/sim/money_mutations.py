"""Defects, to see that the simulation finds them. Each is a patch of what it breaks."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest import mock

from libs.errors import MaasError
from services.gateway.clients import BillingClient
from services.gateway.domain import EndCause
from services.gateway.journal import Journal, Recovered
from services.gateway.limits import RateLimit
from services.gateway.places import Places, _Gate
from services.gateway.quotas import Ticket
from services.gateway.release import Batch, Releaser
from services.gateway.running import Generation
from services.gateway.settlement import Settlement, Settler
from services.gateway.slices import Grant, Hold, SliceBook
from tests.integration.services.billing.reference import Reference

Mutation = Callable[[], AbstractContextManager[object]]


def _settle_without_key() -> AbstractContextManager[object]:
    """Billing settles what it has settled before."""
    settle = Reference.settle

    def twice(self: Reference, generation: str, slice_id: str, account: str, amount: int) -> bool:
        self.charges.pop(generation, None)
        return settle(self, generation, slice_id, account, amount)

    return mock.patch.object(Reference, "settle", twice)


def _acquire_twice() -> AbstractContextManager[object]:
    """A repeat of AcquireSlice, answered as a new slice, holds money once more."""
    acquire = Reference.acquire

    def again(self: Reference, slice_id: str, account: str, required: int, wanted: int) -> int:
        if slice_id in self.slices and self.slices[slice_id].state == "open":
            self.slices[f"{slice_id}+"] = self.slices.pop(slice_id)
        return acquire(self, slice_id, account, required, wanted)

    return mock.patch.object(Reference, "acquire", again)


def _reclaim_without_grace() -> AbstractContextManager[object]:
    """The sweeper frees what has expired at once."""

    def sweep(self: Reference) -> None:
        for item in self.slices.values():
            if item.state == "open" and item.expires_at <= self.now:
                item.state = "reclaimed"

    return mock.patch.object(Reference, "sweep", sweep)


def _close_without_mark() -> AbstractContextManager[object]:
    """Closing an unknown slice leaves no mark: a late AcquireSlice is granted."""

    def close(self: Reference, slice_ids: list[str]) -> None:
        for slice_id in slice_ids:
            if slice_id in self.slices:
                self.slices[slice_id].state = "closed"

    return mock.patch.object(Reference, "close", close)


def _release_before_count() -> AbstractContextManager[object]:
    """Frames leave first; the journal is written in the next turn."""

    def count(self: Releaser, batch: Batch, _: list[Generation]) -> None:
        asyncio.get_running_loop().call_later(0.02, later, self, batch)

    def later(releaser: Releaser, batch: Batch) -> None:
        releaser._journal.progress(batch.progress)

    return mock.patch.object(Releaser, "_count", count)


def _forget_before_answer() -> AbstractContextManager[object]:
    """The journal is told that a batch is durable before billing has it."""
    settle = Settler._settle_and_renew

    async def early(self: Settler, batch: list[Settlement], slice_ids: list[str]) -> None:
        ordinals = [item.ordinal for item in batch if item.ordinal is not None]
        if ordinals:
            self._journal.settled(ordinals)
        await settle(self, batch, slice_ids)

    return mock.patch.object(Settler, "_settle_and_renew", early)


def _drop_unknown_outcome() -> AbstractContextManager[object]:
    """A batch without an answer counts as settled."""
    settle = Settler._settle_and_renew

    async def once(self: Settler, batch: list[Settlement], slice_ids: list[str]) -> None:
        try:
            await settle(self, batch, slice_ids)
        except MaasError:
            self._acknowledge(batch)

    return mock.patch.object(Settler, "_settle_and_renew", once)


def _forget_before_replay() -> AbstractContextManager[object]:
    """What was recovered is deleted when it is read."""
    recover = Journal.recover

    def delete(self: Journal, *arguments: Any) -> Recovered:
        recovered = recover(self, *arguments)
        self.forget(recovered)
        return recovered

    return mock.patch.object(Journal, "recover", delete)


def _charge_what_was_cut() -> AbstractContextManager[object]:
    """A replay charges generations that the gateway's death has cut."""
    recover = Journal.recover

    def charge(self: Journal, *arguments: Any) -> Recovered:
        recovered = recover(self, *arguments)
        recovered.settlements = [
            (opening, dataclasses.replace(closing, cause=EndCause.COMPLETED))
            for opening, closing in recovered.settlements
        ]
        return recovered

    return mock.patch.object(Journal, "recover", charge)


def _ask_before_noting() -> AbstractContextManager[object]:
    """Slices are noted in the journal by nobody: a death leaks them."""
    return mock.patch.object(Journal, "slice_wanted")


def _forget_orphans() -> AbstractContextManager[object]:
    """Slices whose answer never came are not given back."""

    async def nothing(_: SliceBook) -> None:
        return

    return mock.patch.object(SliceBook, "_close_orphans", nothing)


def _take_refusals_for_final() -> AbstractContextManager[object]:
    """A refusal says that nothing is set aside, though an earlier try may still be on its way."""
    return mock.patch("services.gateway.clients.RETRY_MIN_S", 1e9)


def _spend_after_lease() -> AbstractContextManager[object]:
    """Slices are spent from, however long ago their lease has ended."""
    return mock.patch("services.gateway.slices.LEASE_MARGIN_S", -1e9)


def _owe_for_ever() -> AbstractContextManager[object]:
    """What is settled stays owed in the book."""
    return mock.patch.object(SliceBook, "settled")


def _hold_too_little() -> AbstractContextManager[object]:
    """Half of the worst case is held."""
    hold = SliceBook._hold

    def half(self: SliceBook, item: Any, nanos: int) -> Hold:
        return hold(self, item, nanos // 2)

    def owe(_: SliceBook, hold: Hold, nanos: int) -> None:
        hold.slice.held -= hold.nanos
        hold.slice.free += hold.nanos - nanos
        hold.slice.owed += nanos
        hold.nanos = 0

    def shrink(_: SliceBook, hold: Hold, nanos: int) -> None:
        surplus = max(0, hold.nanos - nanos)
        hold.nanos -= surplus
        hold.slice.held -= surplus
        hold.slice.free += surplus

    stack = ExitStack()
    for name, mutant in (("_hold", half), ("owe", owe), ("shrink", shrink)):
        stack.enter_context(mock.patch.object(SliceBook, name, mutant))
    stack.enter_context(mock.patch.object(SliceBook, "try_grow", return_value=True))
    return stack


def _close_while_owed() -> AbstractContextManager[object]:
    """Idle slices are given back while charges wait for their settlement."""
    return mock.patch("services.gateway.slices.Slice.is_busy", property(lambda item: item.held > 0))


def _charge_for_faults() -> AbstractContextManager[object]:
    """A broken output is charged."""
    return mock.patch("services.gateway.domain._CHARGED", set(EndCause))


def _places_without_bound() -> AbstractContextManager[object]:
    """A generation takes a place, whether one is at hand or not."""

    def take(self: Places, limits: Sequence[RateLimit]) -> bool:
        for limit in limits:
            self._gates.setdefault(limit.name, _Gate()).in_use += 1
        return True

    return mock.patch.object(Places, "_try", take)


def _give_quota_back_twice() -> AbstractContextManager[object]:
    """What a request has used goes back, too."""

    def end(self: Ticket, _: int) -> None:
        self.cancel()

    return mock.patch.object(Ticket, "end", end)


def _spend_more_than_granted() -> AbstractContextManager[object]:
    """The book has more than billing has set aside."""
    acquire = BillingClient.acquire

    async def more(self: BillingClient, *arguments: Any) -> Grant:
        grant = await acquire(self, *arguments)
        return dataclasses.replace(grant, granted_nanos=grant.granted_nanos + 50)

    return mock.patch.object(BillingClient, "acquire", more)


def _delete_what_is_open() -> AbstractContextManager[object]:
    """A segment of the journal goes when the next one has begun."""

    def delete(self: Journal) -> None:
        for number in range(1, self._number):
            self._path(number).unlink(missing_ok=True)

    return mock.patch.object(Journal, "_delete_finished", delete)


MUTATIONS: Mapping[str, tuple[str, Mutation]] = {
    "billing settles twice": ("lost messages", _settle_without_key),
    "billing grants twice": ("lost messages", _acquire_twice),
    "reclaimed without grace": ("outages", _reclaim_without_grace),
    "closed without a mark": ("lost messages", _close_without_mark),
    "released before it is counted": ("deaths", _release_before_count),
    "forgotten before the answer": ("lost messages", _forget_before_answer),
    "dropped without an answer": ("outages", _drop_unknown_outcome),
    "forgotten before the replay": ("deaths", _forget_before_replay),
    "charged for what was cut": ("deaths", _charge_what_was_cut),
    "asked before it is noted": ("deaths", _ask_before_noting),
    "orphans are forgotten": ("lost messages", _forget_orphans),
    "refusals are final": ("lost messages near the floor", _take_refusals_for_final),
    "spent after the lease": ("outages", _spend_after_lease),
    "owed for ever": ("near the floor", _owe_for_ever),
    "too little is held": ("near the floor", _hold_too_little),
    "closed while something is owed": ("outages", _close_while_owed),
    "charged for our faults": ("deaths", _charge_for_faults),
    "places without a bound": ("crowds", _places_without_bound),
    "quota goes back twice": ("crowds", _give_quota_back_twice),
    "more than was granted": ("near the floor", _spend_more_than_granted),
    "open segments are deleted": ("deaths", _delete_what_is_open),
}
"""By name: what seeds have to be about to find it, and the patch."""
