"""Metrics of the worker. Labels are outcomes, bounded by the contract."""

from __future__ import annotations

from prometheus_client import Counter

INPUT_TOKENS = Counter("maas_worker_input_tokens_total", "Prompt tokens of accepted executions.")
ENGINE_TOKENS = Counter(
    "maas_worker_engine_tokens_total", "Tokens that the engine drew, released or not."
)
STEPS = Counter("maas_worker_steps_total", "Batches that came out of the engine.")
EXECUTIONS = Counter(
    "maas_worker_executions_total",
    "Executions that are over: OK, or the reason of their failure or refusal.",
    ["outcome"],
)
