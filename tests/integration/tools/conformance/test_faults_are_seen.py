"""Every feature passes on a right deployment, and fails on one that is wrong in one way."""

from __future__ import annotations

import pytest

from tests.integration.tools.conformance.faults import Fault
from tests.integration.tools.conformance.serving import serving
from tests.integration.tools.conformance.stand_in import StandIn
from tools.conformance.features import STREAM, judge
from tools.conformance.verdict import Kind, Verdict

PLACES = {"W-2": 1}
"""Executions on each of the two workers, where a feature fills them."""
STEPS_S = {"U5": 0.05, "frames": 0.004, "W-5": 0.005, "W-6": 0.0005}
"""Time of a token, where a millisecond would be too little or too much."""
BURSTS = {"U3": 8, "drain": 8}
"""Tokens of a step, where there are thousands of them."""
PREFILL_RATES = {"S-4": 3600.0, "S-9": 3600.0}
"""Prompt tokens a second, where the prefill has to take some time."""
FAULTS = {
    "W-1": (
        Fault.SEQUENCE_GAP,
        Fault.NOT_FINISHED,
        Fault.HALF_STOP,
        Fault.HELD_FOR_EVER,
        Fault.SEED_IGNORED,
    ),
    "W-3": (Fault.UNARY_DEARER, Fault.NOT_FINISHED, Fault.RECORDED_TWICE),
    "W-10": (Fault.REFUSAL_COSTS,),
    "U2": (
        Fault.CEILING_OVERRUN,
        Fault.CEILING_EARLY,
        Fault.CEILING_UNNAMED,
        Fault.CEILING_ACCEPTED,
    ),
    "frames": (Fault.INTERVAL_IGNORED, Fault.INTERVAL_UNCHECKED),
    "W-2": (Fault.PLACE_KEPT, Fault.CANCEL_ONCE, Fault.CAUSE_WRONG),
    "U5": (Fault.RECORDED_TWICE, Fault.REVOKED_GO_ON, Fault.REVOKED_AS_ABORTED, Fault.CAUSE_WRONG),
    "B-5": (
        Fault.REPEAT_RUNS_ANEW,
        Fault.REPEAT_UNSAID,
        Fault.REPEAT_COSTS,
        Fault.OTHER_BODY_JOINS,
        Fault.PROJECTS_SHARE,
        Fault.SETTLED_FORGOTTEN,
    ),
    "W-6": (Fault.STALL_UNSEEN, Fault.STALL_EARLY, Fault.CAUSE_WRONG),
    "U3": (
        Fault.RECORDED_TWICE,
        Fault.RESUME_REPEATS,
        Fault.RESUME_SKIPS,
        Fault.RESUME_FOR_ALL,
        Fault.RESUME_PLAIN,
        Fault.RESUME_LATE,
        Fault.DROP_COSTS,
        Fault.DROP_CANCELS,
        Fault.DEATH_SHOWS,
        Fault.DEATH_CHANGES,
        Fault.DEATH_REPEATS,
    ),
    "S-4": (Fault.DEATH_SHOWS, Fault.DEATH_CHANGES),
    "S-9": (Fault.DEATH_SHOWS, Fault.DEATH_CHANGES, Fault.DEATH_REPEATS),
    "drain": (Fault.DRAIN_SHOWS, Fault.DEATH_CHANGES),
}


async def judged(feature: str, fault: Fault) -> Verdict:
    house = StandIn(
        fault,
        step_s=STEPS_S.get(feature, 0.001),
        capacity=PLACES.get(feature, 100),
        prefill_rate=PREFILL_RATES.get(feature, 1e6),
        burst=BURSTS.get(feature, 1),
    )
    async with serving(house) as deployment:
        return await judge(feature, STREAM[feature], deployment)


@pytest.mark.parametrize("feature", STREAM)
async def test_right_deployment_passes(feature: str) -> None:
    verdict = await judged(feature, Fault.NONE)

    assert verdict.kind is Kind.PASS, verdict.line


@pytest.mark.parametrize(
    ("feature", "fault"),
    [(feature, fault) for feature, faults in FAULTS.items() for fault in faults],
    ids=lambda item: item.name if isinstance(item, Fault) else item,
)
async def test_wrong_deployment_fails(feature: str, fault: Fault) -> None:
    verdict = await judged(feature, fault)

    assert verdict.kind is Kind.FAIL, verdict.line
    assert "unforeseen" not in verdict.text
