"""Metrics of the scheduler. Labels are bounded by what is registered, never by traffic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from prometheus_client import REGISTRY, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

GRANTS = Counter("maas_scheduler_grants_total", "Requests that got a slot.")
SPARES_GRANTED = Counter(
    "maas_scheduler_spares_granted_total", "Slots granted beside them for executions that may come."
)
SPARES_TAKEN_BACK = Counter(
    "maas_scheduler_spares_taken_back_total", "Spares whose place went to a request."
)
REFUSALS = Counter("maas_scheduler_refusals_total", "Requests that got no slot.", ["reason"])
QUEUE_WAIT = Histogram(
    "maas_scheduler_queue_wait_seconds",
    "Time in the queue of requests that had to wait and got a slot.",
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60),
)
WORKERS_LOST = Counter("maas_scheduler_workers_lost_total", "Workers lost, by cause.", ["cause"])
INTEGRITY_FAILURES = Counter(
    "maas_scheduler_integrity_failures_total", "Recounts of the state that did not agree."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Counts at one moment.

    Attributes:
        queued: waiting requests by model version; zero for versions that are served.
        slots_in_use: places of slots by worker.
        workers: workers by state.
    """

    queued: dict[str, int] = field(default_factory=dict)
    slots_in_use: dict[str, int] = field(default_factory=dict)
    workers: dict[str, int] = field(default_factory=dict)


class _Gauges(Collector):
    """Shows the latest snapshot.

    Gauges that are set one by one would keep the labels of workers that are gone, and the page is
    read by another thread: it gets a finished value, never the state itself.
    """

    latest = Snapshot()

    @override
    def collect(self) -> Iterable[Metric]:
        """Makes the metrics of the latest snapshot."""
        latest = self.latest
        yield _gauge(
            "maas_scheduler_queue_length", "Waiting requests.", "model_version", latest.queued
        )
        yield _gauge(
            "maas_scheduler_slots_in_use",
            "Places of slots granted that have not ended.",
            "worker",
            latest.slots_in_use,
        )
        yield _gauge("maas_scheduler_workers", "Workers by state.", "state", latest.workers)


def _gauge(name: str, text: str, label: str, values: dict[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


GAUGES = _Gauges()
REGISTRY.register(GAUGES)
