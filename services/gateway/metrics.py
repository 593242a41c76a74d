"""Metrics of a gateway."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

GENERATIONS_RUNNING = Gauge(
    "maas_gateway_generations_running", "Generations between admission and end."
)
GENERATIONS_ENDED = Counter(
    "maas_gateway_generations_ended_total", "Accepted generations by cause of the end.", ["cause"]
)
GENERATIONS_MOVED = Counter(
    "maas_gateway_generations_moved_total", "Generations that went on with another worker."
)
REPLAYS = Counter(
    "maas_gateway_replays_total",
    "Calls that attached to a generation that another call had started.",
)
REPLAY_BYTES = Gauge("maas_gateway_replay_bytes", "Output that is kept for replays.")
TOKENS_RELEASED = Counter(
    "maas_gateway_tokens_released_total", "Output tokens of ended generations."
)
TIME_TO_FIRST_TOKEN = Histogram(
    "maas_gateway_time_to_first_token_seconds",
    "From the call's arrival until its first delta.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
SETTLEMENTS_QUEUED = Gauge(
    "maas_gateway_settlements_queued", "Ended generations that are not known to be durable."
)
SETTLEMENTS_REFUSED = Counter(
    "maas_gateway_settlements_refused_total", "Settlements that billing called wrong: defects."
)
