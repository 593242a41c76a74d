"""Every feature of group `request` passes on a right deployment, and fails on a wrong one."""

from __future__ import annotations

from typing import Any

import pytest

from libs.capabilities import FLAGS
from tests.integration.tools.conformance.request_faults import Wrong
from tests.integration.tools.conformance.serving import serving
from tests.integration.tools.conformance.stand_in_request import RequestStandIn
from tools.conformance.features import REQUEST, judge
from tools.conformance.verdict import Kind, Verdict

PACES_S = {"bombs": 0.002}
"""Time of a frame, where another stream's pace is looked at."""
FAULTS = {
    "C-4": (
        Wrong.FLAG_UNNAMED,
        Wrong.FLAG_REASON,
        Wrong.FLAG_COSTS,
        Wrong.FLAGS_STAY,
        Wrong.VECTORS_UNASKED,
        Wrong.TOO_MANY_CLAMPED,
        Wrong.WIDE_ANSWER,
        Wrong.ALTERNATIVES_UNSORTED,
        Wrong.PROMPT_LOGPROBS_SHORT,
        Wrong.PROMPT_SCORES_UNSTREAMED,
        Wrong.PRESENCE_IGNORED,
        Wrong.REASONING_HIDDEN_UNCOUNTED,
        Wrong.NOT_UNIT,
        Wrong.ARGUMENTS_INVALID,
        Wrong.SCHEMA_CUT,
    ),
    "W-4": (Wrong.BOUND_UNNAMED, Wrong.BOUND_COSTS, Wrong.MODEL_GUESSED),
    "W-11": (
        Wrong.COUNT_OFF,
        Wrong.QUOTE_OFF,
        Wrong.QUOTE_LOW,
        Wrong.DETOKENIZED_TRIMMED,
        Wrong.IDS_CUT,
        Wrong.CONTINUE_CLOSES,
        Wrong.CONTROL_TYPED,
        Wrong.TURNS_UNCHECKED,
        Wrong.MARK_SHOWN,
        Wrong.REASONING_UNCOUNTED,
        Wrong.REASONING_STREAMED,
        Wrong.FRAGMENTS_MIXED,
        Wrong.FRAGMENT_NUMBER,
        Wrong.FRAGMENT_NAMED,
        Wrong.FRAGMENTS_WHOLE,
        Wrong.FRAGMENTS_LOST,
        Wrong.ARGUMENTS_INVALID,
        Wrong.OTHER_TOOL,
        Wrong.CALLS_UNASKED,
        Wrong.TOLD_OF_TOOLS,
        Wrong.CALL_IDS_REPEAT,
        Wrong.CALL_END,
    ),
    "W-12": (
        Wrong.SCHEMA_BROKEN,
        Wrong.SCHEMA_CUT,
        Wrong.BAD_SCHEMA_ACCEPTED,
        Wrong.BAD_GRAMMAR_ACCEPTED,
        Wrong.BAD_REASON,
        Wrong.BAD_UNNAMED,
        Wrong.BAD_COSTS,
        Wrong.BAD_HARMS,
    ),
    "W-13": (
        Wrong.PROMPT_COUNTED_AGAIN,
        Wrong.PROMPT_CHARGED_AGAIN,
        Wrong.OUTPUTS_EQUAL,
        Wrong.FIRST_SEED,
        Wrong.OUTPUT_LOST,
        Wrong.LABELS_LOST,
        Wrong.RECORD_OFF,
        Wrong.LOGPROBS_SHIFTED,
        Wrong.LOGPROBS_LATE,
        Wrong.ALTERNATIVES_UNSORTED,
        Wrong.SCORES_CHANGE,
        Wrong.SCORES_LATE,
        Wrong.SCORES_UNSTREAMED,
        Wrong.TOP_MISSING,
        Wrong.BYTES_OFF,
        Wrong.STOP_CUT,
        Wrong.STOP_UNCOUNTED,
        Wrong.STOP_UNNAMED,
        Wrong.STOP_TOKEN_IGNORED,
        Wrong.STOP_TOKEN_SHOWN,
        Wrong.TOP_K_IGNORED,
        Wrong.TOP_P_IGNORED,
        Wrong.DURATION_UNNAMED,
        Wrong.DURATION_EMPTY,
    ),
    "W-16": (
        Wrong.NOT_UNIT,
        Wrong.BIG_ENDIAN,
        Wrong.HALVES_WRONG,
        Wrong.UNSCALED,
        Wrong.COMPANY,
        Wrong.IDS_DIFFER,
        Wrong.MEANINGLESS,
        Wrong.EMBED_TWICE,
        Wrong.EMBED_RECORDED_OFF,
        Wrong.EMBED_OUTPUT,
        Wrong.LARGE_ANSWER,
        Wrong.WIDE_ANSWER,
    ),
    "W-17": (
        Wrong.ADAPTER_STAYS,
        Wrong.ADAPTER_UNSTABLE,
        Wrong.ADAPTER_UNKNOWN,
        Wrong.ADAPTER_AGAIN,
        Wrong.ADAPTER_REPLACED,
    ),
    "cache": (
        Wrong.STRANGERS_HIT,
        Wrong.SALT_IS_ALL,
        Wrong.SALT_IGNORED,
        Wrong.BYPASS_IGNORED,
        Wrong.HIT_WHOLE,
        Wrong.HIT_DEARER,
        Wrong.HIT_UNPRICED,
        Wrong.HIT_UNRECORDED,
        Wrong.SCORED_FROM_CACHE,
    ),
    "bombs": (Wrong.REFUSAL_SLOW, Wrong.OTHERS_WAIT, Wrong.BOMB_ACCEPTED),
}
SHOWN_ELSEWHERE = {"adapters": "W-17", "embedding_dimensions": "W-16"}
"""Flags whose effect another feature shows."""
INFORMATION = {"prompt_cache", "deterministic"}
"""Flags that no field depends on."""
UNCHECKED = (
    "spec.text",
    "spec.chat.messages",
    "spec.sampling.temperature",
    "spec.sampling.logit_bias",
    "spec.stop.max_output_tokens",
    "spec.output.count",
    "spec.tools.tools[0].name",
    "spec.constraint.choices",
    "spec.labels",
    "spec.end_user",
    "spec.priority",
    "spec.max_duration",
    "spec.max_charge.currency_code",
    "inputs",
    "encoding",
)
"""Fields whose bounds are not enforced, one at a time."""


async def judged(feature: str, wrong: Wrong = Wrong.NOTHING, **how: Any) -> Verdict:
    house = RequestStandIn(wrong, pace_s=PACES_S.get(feature, 0.0), **how)
    async with serving(house) as deployment:
        return await judge(feature, REQUEST[feature], deployment)


def expect_failure(verdict: Verdict) -> None:
    assert verdict.kind is Kind.FAIL, verdict.line
    assert "unforeseen" not in verdict.text
    # That the stand-in breaks is nothing that was seen.
    assert "Unexpected <class" not in verdict.text, verdict.line


@pytest.mark.parametrize("feature", REQUEST)
async def test_right_deployment_passes(feature: str) -> None:
    verdict = await judged(feature)

    assert verdict.kind is Kind.PASS, verdict.line


@pytest.mark.parametrize(
    ("feature", "wrong"),
    [(feature, wrong) for feature, faults in FAULTS.items() for wrong in faults],
    ids=lambda item: item.name if isinstance(item, Wrong) else item,
)
async def test_wrong_deployment_fails(feature: str, wrong: Wrong) -> None:
    expect_failure(await judged(feature, wrong))


@pytest.mark.parametrize("flag", FLAGS)
async def test_flag_that_is_true_and_ignored_is_seen(flag: str) -> None:
    if flag == "embedding_dimensions":
        expect_failure(await judged("W-16", Wrong.UNSCALED))
        return

    expect_failure(await judged(SHOWN_ELSEWHERE.get(flag, "C-4"), ignored=flag))


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag not in INFORMATION])
async def test_flag_that_is_false_and_accepted_is_seen(flag: str) -> None:
    expect_failure(await judged("C-4", accepted=flag))


@pytest.mark.parametrize("path", UNCHECKED)
async def test_bound_that_is_not_enforced_is_seen(path: str) -> None:
    expect_failure(await judged("W-4", unchecked=path))


def test_every_fault_is_tried() -> None:
    tried = {wrong for faults in FAULTS.values() for wrong in faults}

    assert set(Wrong) - tried == {Wrong.NOTHING}
