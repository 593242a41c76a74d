"""What the gateway knows of other services' state: offerings, adapters, prices, workers.

Each table is fed by a watch; requests read it without waiting for anybody. When the other service
is away the table stays as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from maas.common.v1.capabilities_pb2 import Capabilities

from libs import capabilities
from libs.errors import FailedPrecondition, MaasError, Reason, Unavailable, not_found, unavailable
from services.gateway.domain import Adapter, Offering, Price, price_in_force


class Table:
    """Base: knows whether its first listing is complete."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._complete = asyncio.Event()

    def complete(self) -> None:
        """Says that the first listing is complete."""
        self._complete.set()

    async def wait(self) -> None:
        """Waits for the first listing."""
        await self._complete.wait()

    def require(self) -> None:
        """Refuses to answer from a table that was never complete.

        Raises:
            Unavailable: names the service that feeds the table.
        """
        if not self._complete.is_set():
            raise unavailable(self._service)


class Offerings(Table):
    """What tenants may call."""

    def __init__(self) -> None:
        super().__init__("catalog")
        self._by_name: dict[str, Offering] = {}

    def apply(self, offerings: Iterable[Offering]) -> None:
        """Adds or replaces."""
        self._by_name.update((offering.name, offering) for offering in offerings)

    def get(self, model: str) -> Offering:
        """Returns an offering by its id or its name.

        Raises:
            NotFound: there is none.
            Unavailable: the table was never complete.
        """
        name = model if model.startswith("offerings/") else f"offerings/{model}"
        offering = self._by_name.get(name)
        if offering is None:
            self.require()
            raise not_found(name)
        return offering


class Adapters(Table):
    """LoRA adapters."""

    def __init__(self) -> None:
        super().__init__("catalog")
        self._by_name: dict[str, Adapter] = {}
        # What a new stream has listed so far: what it does not list was deleted meanwhile.
        self._listing: dict[str, Adapter] | None = None

    def begin(self) -> None:
        """Says that a new stream begins: what an earlier one has listed in part does not count."""
        self._listing = None

    def apply(
        self,
        adapters: Iterable[Adapter],
        deleted_names: Iterable[str],
        *,
        is_snapshot: bool,
        is_complete: bool,
    ) -> None:
        """Takes a part of the watch.

        Args:
            adapters: that are new.
            deleted_names: of those that are gone.
            is_snapshot: it belongs to the first listing of a stream.
            is_complete: it is the last part of that.
        """
        if is_snapshot and self._listing is None:
            self._listing = {}
        target = self._by_name if self._listing is None else self._listing
        target.update((adapter.name, adapter) for adapter in adapters)
        for name in deleted_names:
            target.pop(name, None)
        if is_complete and self._listing is not None:
            self._by_name, self._listing = self._listing, None
            self.complete()

    def get(self, name: str, project: str) -> Adapter:
        """Returns an adapter that a project may use.

        Raises:
            NotFound: there is none, or it is another project's, which looks the same.
            Unavailable: the table was never complete.
        """
        adapter = self._by_name.get(name)
        if adapter is None or adapter.project not in {"", project}:
            self.require()
            raise not_found(name)
        return adapter


class Prices(Table):
    """The price book."""

    def __init__(self) -> None:
        super().__init__("billing")
        self._by_offering: dict[str, dict[str, Price]] = {}

    def apply(self, prices: Iterable[Price]) -> None:
        """Adds."""
        for price in prices:
            self._by_offering.setdefault(price.offering, {})[price.name] = price

    def get(self, offering: str, now: datetime) -> Price:
        """Returns the price in force.

        Raises:
            FailedPrecondition: PRICE_MISSING.
            Unavailable: the table was never complete.
        """
        price = price_in_force(list(self._by_offering.get(offering, {}).values()), now)
        if price is None:
            self.require()
            raise FailedPrecondition(
                f"{offering} has no price in force",
                reason=Reason.PRICE_MISSING,
                metadata={"offering": offering},
            )
        return price


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A worker that takes work.

    Attributes:
        name: "workers/{worker}".
        endpoint: host:port.
        epoch: for its executions.
        model_versions: that it serves.
        capabilities: what it can do; None when it does not say.
    """

    name: str
    endpoint: str
    epoch: int
    model_versions: frozenset[str]
    capabilities: Capabilities | None = None


class Workers(Table):
    """Workers that take work, for the time when no slot can be acquired."""

    def __init__(self) -> None:
        super().__init__("scheduler")
        self._by_name: dict[str, Worker] = {}
        # By model version; made when first asked for, and anew when a worker comes or goes.
        self._capabilities: dict[str, Capabilities] = {}
        self._may_reason: dict[str, bool] = {}

    def put(self, worker: Worker) -> None:
        """Adds or replaces."""
        self._by_name[worker.name] = worker
        self._changed()

    def drop(self, name: str) -> None:
        """Forgets a worker that takes no work."""
        self._by_name.pop(name, None)
        self._changed()

    def capabilities_of(self, model_version: str) -> Capabilities | None:
        """Returns what all workers of a version can do; None while none is known that says."""
        if model_version not in self._capabilities:
            said = [
                worker.capabilities
                for worker in self.serving(model_version, set())
                if worker.capabilities is not None
            ]
            # Versions that nobody serves are not remembered: there is no end of them.
            if not said:
                return None
            self._capabilities[model_version] = capabilities.intersection(said)
        return self._capabilities[model_version]

    def may_reason(self, model_version: str) -> bool:
        """Tells whether reasoning may come from a worker of a version: from any, not from all.

        True as long as none is known: nobody knows what the one that comes is going to do.
        """
        if model_version not in self._may_reason:
            workers = self.serving(model_version, set())
            if not workers:
                return True
            self._may_reason[model_version] = any(
                worker.capabilities is None or worker.capabilities.reasoning for worker in workers
            )
        return self._may_reason[model_version]

    def find(self, name: str) -> Worker | None:
        """Returns a worker by its name, if it takes work."""
        return self._by_name.get(name)

    def endpoints(self) -> set[tuple[str, str]]:
        """Returns name and endpoint of each."""
        return {(worker.name, worker.endpoint) for worker in self._by_name.values()}

    def serving(self, model_version: str, exclude: set[str]) -> list[Worker]:
        """Lists workers of a version, by name."""
        return sorted(
            (
                worker
                for worker in self._by_name.values()
                if model_version in worker.model_versions and worker.name not in exclude
            ),
            key=lambda worker: worker.name,
        )

    def _changed(self) -> None:
        self._capabilities.clear()
        self._may_reason.clear()


def no_ready_worker(model_version: str) -> MaasError:
    """Makes the error for a version that nobody serves now."""
    return Unavailable(
        "no worker serves the model now",
        reason=Reason.NO_READY_WORKER,
        metadata={"modelVersion": model_version},
        retry_after_s=1.0,
    )
