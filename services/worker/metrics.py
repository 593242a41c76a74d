"""Metrics of the worker. Labels are outcomes, bounded by the contract."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from services.worker.engine.base import LoadStage

INPUT_TOKENS = Counter("maas_worker_input_tokens_total", "Prompt tokens of accepted executions.")
ENGINE_TOKENS = Counter(
    "maas_worker_engine_tokens_total", "Tokens that the engine drew, released or not."
)
ENGINE_BUSY = Counter(
    "maas_worker_engine_busy_seconds_total",
    "Time in which the engine had outputs to work on; brought up to date when one comes or goes.",
)
STEPS = Counter("maas_worker_steps_total", "Batches that came out of the engine.")
EXECUTIONS = Counter(
    "maas_worker_executions_total",
    "Outputs that ended well (OK), and executions that failed or were refused, by reason.",
    ["outcome"],
)
KV_RESTARTS = Counter(
    "maas_worker_kv_restarts_total",
    "Times that watchers of the prefix cache had to forget everything: the engine said so (engine),"
    " it has more blocks than are remembered (full), or one of them read too slowly"
    " (slow_watcher).",
    ["cause"],
)
LOAD_STAGE = Gauge(
    "maas_worker_load_stage",
    "1 at what the worker is at: a stage of loading its model, or loaded.",
    ["stage"],
)
LOADED = "loaded"
STUCK_OUTPUTS = Gauge(
    "maas_worker_stuck_outputs",
    "Outputs that were aborted long ago and that the engine does not end, though it runs others.",
)

# Steps that the two metrics of steps may be behind while executions run.
STEPS_BEHIND_MAX = 50


class StepMeter:
    """Counts steps and their tokens. An increment of a metric takes a lock, so it is not each."""

    __slots__ = ("_steps", "_tokens")

    def __init__(self) -> None:
        self._steps = 0
        self._tokens = 0

    def add(self, tokens: int, *, may_be_last: bool) -> None:
        """Counts a step.

        Args:
            tokens: that it gave.
            may_be_last: whether there may be no other for long: then the metrics are exact.
        """
        self._steps += 1
        self._tokens += tokens
        if may_be_last or self._steps >= STEPS_BEHIND_MAX:
            STEPS.inc(self._steps)
            ENGINE_TOKENS.inc(self._tokens)
            self._steps = self._tokens = 0


def show_load_stage(stage: LoadStage | None) -> None:
    """Shows what a starting worker is at; None for one that has loaded its model."""
    current = LOADED if stage is None else stage.value
    for name in (*(known.value for known in LoadStage), LOADED):
        LOAD_STAGE.labels(name).set(name == current)
