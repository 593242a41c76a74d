"""Makes the checks of the contract on engines, and gives one verdict for each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from services.worker.engine.base import EngineDied, EngineStartError
from tools.conformance.engine.check import Check
from tools.conformance.engine.contract import CHECKS
from tools.conformance.engine.rows import Row
from tools.conformance.engine.shared import Shared
from tools.conformance.verdict import CannotShow, Kind, Mismatch, Verdict

CHECK_S = 180.0
"""Longest time of one check, the start of an engine left out."""

Tell = Callable[[str], None]
MakeRow = Callable[[Path], Row]


def chosen(only: Sequence[str]) -> list[Check]:
    """The checks that were asked for; all of them when nothing was.

    Args:
        only: names of groups, of checks, or of checks without their case.
    """
    return [check for check in CHECKS if not only or not names_of(check).isdisjoint(only)]


def names_of(check: Check) -> set[str]:
    """What a check can be asked for by."""
    return {check.group, check.name, check.name.partition("[")[0]}


def known_names() -> set[str]:
    """All that checks can be asked for by."""
    return {name for check in CHECKS for name in names_of(check)}


async def run(
    rows: Mapping[str, MakeRow], only: Sequence[str], folder: Path, tell: Tell
) -> list[Verdict]:
    """Makes checks on engines, one engine after the other.

    Args:
        rows: what makes each engine's row, by its name.
        only: names of groups or checks; all when empty.
        folder: for models and adapters; empty.
        tell: takes each line as it is known.
    """
    verdicts: list[Verdict] = []
    for name, make_row in rows.items():
        place = folder / name
        await asyncio.to_thread(place.mkdir)
        async for verdict in _on_engine(name, make_row, chosen(only), place, tell):
            tell(verdict.line)
            verdicts.append(verdict)
    return verdicts


async def _on_engine(
    name: str, make_row: MakeRow, checks: Sequence[Check], folder: Path, tell: Tell
) -> AsyncIterator[Verdict]:
    try:
        row = await asyncio.to_thread(make_row, folder)
    except CannotShow as reason:
        for check in checks:
            yield Verdict(Kind.SKIP, f"{name}/{check.name}", str(reason))
        return
    if row.remark:
        tell(f"{name}: {row.remark}")
    reason_of_start = ""
    async with _sharing(row, folder) as shared:
        for check in checks:
            feature = f"{name}/{check.name}"
            if reason_of_start:
                yield Verdict(Kind.SKIP, feature, reason_of_start)
                continue
            try:
                yield await judge(shared, check, feature)
            except EngineStartError as error:
                reason_of_start = "the engine did not start for an earlier check"
                yield Verdict(Kind.FAIL, feature, f"the engine does not start: {error}")


@asynccontextmanager
async def _sharing(row: Row, folder: Path) -> AsyncIterator[Shared]:
    shared = Shared(row, folder)
    try:
        yield shared
    finally:
        await shared.stop()


async def judge(shared: Shared, check: Check, feature: str) -> Verdict:
    """Makes one check; whatever happens becomes a verdict.

    Args:
        shared: lends the engine.
        check: to make.
        feature: name of the verdict.

    Raises:
        EngineStartError: there is no engine to make it on.
    """
    try:
        async with shared.lend(ends_engine=check.ends_engine) as harness, asyncio.timeout(CHECK_S):
            await check.perform(harness)
    except EngineStartError:
        raise
    except CannotShow as reason:
        return Verdict(Kind.SKIP, feature, str(reason))
    except Mismatch as mismatch:
        return Verdict(Kind.FAIL, feature, str(mismatch))
    except EngineDied as death:
        return Verdict(Kind.FAIL, feature, f"the engine died: {death}")
    except TimeoutError:
        return Verdict(Kind.FAIL, feature, f"expected an end, got none in {CHECK_S:.0f} s")
    except Exception as error:  # noqa: BLE001 - what nobody foresaw fails one check, not the run
        return Verdict(Kind.FAIL, feature, f"unforeseen: {error!r}")
    return Verdict(Kind.PASS, feature, check.sentence)
