"""services/worker/metrics.py: steps are counted, now and then; what it loads."""

from __future__ import annotations

from prometheus_client import Counter

from services.worker import metrics
from services.worker.engine.base import LoadStage
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


def test_one_stage_of_loading_is_shown_at_a_time() -> None:
    metrics.show_load_stage(LoadStage.CHECKING)
    metrics.show_load_stage(LoadStage.LOADING)
    assert shown_stages() == {"checking": 0, "loading": 1, "warming": 0, "loaded": 0}

    metrics.show_load_stage(None)
    assert shown_stages() == {"checking": 0, "loading": 0, "warming": 0, "loaded": 1}


def shown_stages() -> dict[str, float]:
    (family,) = metrics.LOAD_STAGE.collect()
    return {sample.labels["stage"]: sample.value for sample in family.samples}
