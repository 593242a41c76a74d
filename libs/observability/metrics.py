"""Prometheus metrics that every process has, and the page they are read from.

Metrics of one service are declared in that service's `metrics.py`.
"""

from __future__ import annotations

from prometheus_client import Counter, Histogram, start_http_server

# Labels are methods and codes only: bounded by the contract, never by traffic.
RPC_COMPLETED = Counter(
    "maas_rpc_completed_total", "Calls that ended, by method and status code.", ["method", "code"]
)
RPC_DURATION = Histogram(
    "maas_rpc_duration_seconds",
    "Duration of calls by method.",
    ["method"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 600),
)


def serve_metrics(address: str) -> None:
    """Serves the page on host:port, in a thread of its own.

    Raises:
        OSError: the port is taken.
    """
    host, _, port = address.rpartition(":")
    start_http_server(int(port), addr=host)
