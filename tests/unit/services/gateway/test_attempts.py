"""How long a generation waits for a place."""

from __future__ import annotations

import pytest
from maas.engine.v1 import engine_pb2
from typing_extensions import override

from libs.errors import DeadlineExceeded, FieldRule, InvalidArgument, MaasError, Reason
from libs.testing import FakeClock
from services.gateway.attempts import Attempts
from services.gateway.generation import new_sink
from services.gateway.placement import MakeExecution, Placed, Placer, Wanted
from services.gateway.tables import no_ready_worker


class Refusing(Placer):
    """Notes what is wanted, and has no worker for it."""

    def __init__(self, refusal: MaasError | None = None) -> None:
        self.refusal = refusal
        self.wanted: list[Wanted] = []
        self.made: list[engine_pb2.Execution] = []

    @override
    async def place(self, wanted: Wanted, make: MakeExecution) -> Placed:
        self.wanted.append(wanted)
        self.made.append(make("e", 1))
        raise self.refusal or no_ready_worker(wanted.model_version)


def attempts(placer: Placer, clock: FakeClock, time_limit_s: float | None) -> Attempts:
    return Attempts(
        placer=placer,
        clock=clock,
        execution=engine_pb2.Execution(text="x"),
        generation_id="g",
        project="projects/p",
        queue_wait_s=5.0,
        deadline_s=None,
        time_limit_s=time_limit_s,
        affinity=b"",
        new_sink=new_sink,
    )


@pytest.mark.parametrize(("left_s", "wait_s"), [(None, 5.0), (2.0, 2.0), (60.0, 5.0)])
async def test_a_time_limit_bounds_the_wait_for_a_place(
    left_s: float | None, wait_s: float
) -> None:
    clock, placer = FakeClock(), Refusing()
    limit_s = None if left_s is None else clock.monotonic_s() + left_s

    with pytest.raises(Exception, match="no worker"):
        await attempts(placer, clock, limit_s).first()

    assert [wanted.max_wait_s for wanted in placer.wanted] == [wait_s]
    assert placer.made[0].HasField("time_limit") == (left_s is not None)


async def test_what_has_used_up_its_time_is_not_placed() -> None:
    clock, placer = FakeClock(), Refusing()

    with pytest.raises(DeadlineExceeded) as caught:
        await attempts(placer, clock, clock.monotonic_s()).first()

    assert caught.value.reason is Reason.QUEUE_TIMEOUT
    assert placer.wanted == []


@pytest.mark.parametrize(
    ("message", "metadata", "reason", "expected"),
    [
        (
            "spec.sampling.min_p: the model cannot do this (min_p)",
            {"model": "m", "feature": "min_p"},
            Reason.FEATURE_UNSUPPORTED,
            ("spec.sampling.min_p", FieldRule.UNSUPPORTED),
        ),
        (
            "the regex: is none",
            {"field": "spec.constraint.regex"},
            Reason.BAD_OUTPUT_CONSTRAINT,
            ("spec.constraint.regex", FieldRule.BAD_FORMAT),
        ),
        (
            "the prompt has 9 tokens: at most 8",
            {"tokens": "9", "limit": "8"},
            Reason.CONTEXT_LENGTH_EXCEEDED,
            ("spec.text", FieldRule.TOO_LONG),
        ),
    ],
)
async def test_a_refusal_of_a_worker_has_the_path_of_the_field(
    message: str, metadata: dict[str, str], reason: Reason, expected: tuple[str, FieldRule]
) -> None:
    placer = Refusing(InvalidArgument(message, reason=reason, metadata=metadata))

    with pytest.raises(InvalidArgument) as caught:
        await attempts(placer, FakeClock(), None).first()

    assert [(bad.field, bad.rule) for bad in caught.value.violations] == [expected]
    assert caught.value.reason is reason
