"""services/worker/metrics.py: steps are counted, now and then."""

from __future__ import annotations

from prometheus_client import Counter

from services.worker.metrics import ENGINE_TOKENS, STEPS, STEPS_BEHIND_MAX, StepMeter


def counts() -> tuple[float, float]:
    return value_of(STEPS), value_of(ENGINE_TOKENS)


def value_of(counter: Counter) -> float:
    (metric,) = counter.collect()
    return next(sample.value for sample in metric.samples if sample.name.endswith("_total"))


def test_the_metrics_are_behind_by_few_steps_and_exact_when_something_has_ended() -> None:
    meter = StepMeter()
    steps, tokens = counts()

    for _ in range(STEPS_BEHIND_MAX - 1):
        meter.add(3, may_be_last=False)
    assert counts() == (steps, tokens)
    meter.add(3, may_be_last=False)
    assert counts() == (steps + STEPS_BEHIND_MAX, tokens + 3 * STEPS_BEHIND_MAX)
    meter.add(2, may_be_last=True)

    assert counts() == (steps + STEPS_BEHIND_MAX + 1, tokens + 3 * STEPS_BEHIND_MAX + 2)
