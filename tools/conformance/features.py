"""The features by group, in the order in which they are shown."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType

from tools.conformance import (
    ability,
    constrained,
    continuity,
    conversation,
    delivery,
    money,
    money_credit,
    money_ends,
    money_limits,
    money_meter,
    money_outage,
    money_proof,
    release,
    scoring,
    sharing,
    vectors,
)
from tools.conformance.client import Refusal
from tools.conformance.deployment import Deployment
from tools.conformance.trial import Trial
from tools.conformance.verdict import CannotShow, Kind, Mismatch, Verdict

FEATURE_S = 240.0
"""Longest time of one feature, without the limits of the deployment that it waits for."""

Show = Callable[[Trial], Awaitable[None]]

STREAM: Mapping[str, Show] = MappingProxyType(
    {
        "W-1": delivery.deltas_make_the_answer,
        "W-3": delivery.unary_is_the_stream,
        "W-5": delivery.streams_share_the_engine,
        "W-10": release.long_prompt_costs_nothing,
        "U2": money.ceiling_is_kept,
        "frames": delivery.frames_follow_interval_and_reader,
        "W-2": release.leaving_frees_the_place,
        "U5": release.revoking_cuts_streams,
        "B-5": money.repeats_are_one,
        "W-6": delivery.stalled_reader_harms_nobody,
        "U3": continuity.one_bill_over_drops_and_a_death,
        "S-4": continuity.death_before_the_first_token,
        "S-9": continuity.death_in_the_middle,
        "drain": continuity.drain_loses_nothing,
    }
)
REQUEST: Mapping[str, Show] = MappingProxyType(
    {
        "C-4": ability.flags_are_true,
        "W-4": ability.bounds_are_kept,
        "W-10": release.long_prompt_costs_nothing,
        "W-11": conversation.conversations_are_rendered,
        "W-12": constrained.output_matches_its_schema,
        "W-13": scoring.outputs_share_the_prompt,
        "W-16": vectors.vectors_are_exact,
        "W-17": vectors.adapters_are_applied,
        "cache": sharing.cache_is_the_tenants,
        "bombs": sharing.bombs_are_refused,
    }
)
MONEY: Mapping[str, Show] = MappingProxyType(
    {
        "B-1": money_meter.tokens_are_counted,
        "B-2": money_meter.held_then_settled_once,
        "B-5": money_credit.repeats_are_one,
        "U9": money_meter.quotes_come_true,
        "U2": money_credit.ceilings_are_kept,
        "B-6": money_credit.grants_are_used_in_order,
        "B-3": money_limits.budgets_are_not_overshot,
        "B-8": money_limits.rates_are_kept,
        "B-9": money_limits.retry_info_comes_true,
        "B-11": money_limits.alerts_come_once,
        "B-7": money_meter.sums_agree,
        "B-12": money_proof.exports_can_be_replayed,
        "U4": money_proof.receipts_verify,
        "B-13": money_meter.engine_time_is_shared,
        "B-4": money_ends.every_end_has_its_charge,
        "B-10": money_ends.nothing_costs_nothing,
        "U1": money_ends.kills_leave_exact_books,
        "U6": money_proof.the_auditor_finds_it,
        "postgres": money_outage.the_database_may_go,
    }
)
GROUPS: Mapping[str, Mapping[str, Show]] = MappingProxyType(
    {"stream": STREAM, "request": REQUEST, "money": MONEY}
)


async def run(
    features: Mapping[str, Show],
    deployment: Deployment,
    only: Sequence[str],
    tell: Callable[[str], None],
) -> list[Verdict]:
    """Shows features one after the other: they share the workers.

    Args:
        features: of the group, by id.
        deployment: what is tested.
        only: ids to show; all when empty.
        tell: takes each line as it is known.
    """
    verdicts = []
    for feature, show in features.items():
        if not only or feature in only:
            verdict = await judge(feature, show, deployment)
            tell(verdict.line)
            verdicts.append(verdict)
    return verdicts


async def judge(feature: str, show: Show, deployment: Deployment) -> Verdict:
    """Shows one feature; whatever happens becomes a verdict."""
    limit_s = FEATURE_S + 3 * deployment.stall_limit_s + 2 * deployment.replay_window_s
    trial = Trial(deployment)
    try:
        async with asyncio.timeout(limit_s), trial:
            await show(trial)
    except CannotShow as reason:
        trial.lack(str(reason))
    except Mismatch as mismatch:
        return Verdict(Kind.FAIL, feature, str(mismatch))
    except Refusal as refusal:
        return Verdict(Kind.FAIL, feature, f"expected an answer, got {refusal}")
    except TimeoutError:
        return Verdict(Kind.FAIL, feature, f"expected an end, got none in {limit_s:.0f} s")
    except Exception as error:  # noqa: BLE001 - what nobody foresaw fails one feature, not the run
        return Verdict(Kind.FAIL, feature, f"unforeseen: {error!r}")
    return trial.findings.verdict(feature)
