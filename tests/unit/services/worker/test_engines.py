from __future__ import annotations

import pytest
from typing_extensions import override

from libs.clock import SystemClock
from libs.testing import FakeClock
from services.worker.engine.base import (
    Ended,
    EndReason,
    EngineDied,
    EngineStartError,
    StepBatch,
)
from services.worker.engine.sim import FLAT_OUT, SimCosts, SimEngine
from services.worker.engine.sim_tokenizer import SimTokenizer
from services.worker.engines import probe

TOKENIZER = SimTokenizer()


class Broken(SimEngine):
    """Answers every execution in one way."""

    answer: Exception | Ended

    @override
    async def next_step(self) -> StepBatch:
        if isinstance(self.answer, Exception):
            raise self.answer
        return StepBatch(ended=[self.answer])


def sizes() -> dict[str, int]:
    return {"capacity": 1, "context_length": 64, "kv_tokens": 64}


async def test_an_engine_that_draws_a_token_is_good() -> None:
    engine = SimEngine(SystemClock(), TOKENIZER, costs=FLAT_OUT, **sizes())

    await probe(engine, 5)

    assert engine.load().running == 0


async def test_an_engine_that_draws_nothing_is_not() -> None:
    engine = SimEngine(FakeClock(), TOKENIZER, costs=SimCosts(), **sizes())

    with pytest.raises(EngineStartError, match="no token within"):
        await probe(engine, 0.01)
    await engine.stop()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (EngineDied("out of memory"), "out of memory"),
        (Ended(0, EndReason.FAILED, message="bad tensor"), "bad tensor"),
    ],
)
async def test_an_engine_that_fails_says_why(answer: Exception | Ended, said: str) -> None:
    engine = Broken(SystemClock(), TOKENIZER, costs=FLAT_OUT, **sizes())
    engine.answer = answer

    with pytest.raises(EngineStartError, match=said):
        await probe(engine, 5)
