"""libs/process.py: background tasks."""

from __future__ import annotations

import asyncio

from structlog.testing import capture_logs

from libs.process import Background


async def test_failed_task_is_reported_and_logged() -> None:
    failures: list[BaseException] = []

    async def fail() -> None:
        raise ValueError("broken")

    with capture_logs() as logs:
        async with Background(on_failure=failures.append) as background:
            background.start(fail(), name="failing")
            await asyncio.sleep(0.001)

    assert [str(failure) for failure in failures] == ["broken"]
    assert [(event["event"], event["task"]) for event in logs] == [
        ("background task failed", "failing")
    ]


async def test_leaving_cancels_what_runs_and_waits_for_it() -> None:
    steps: list[str] = []

    async def run() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            steps.append("ended")

    async with Background(on_failure=lambda _: steps.append("failed")) as background:
        background.start(run(), name="endless")
        await asyncio.sleep(0)

    assert steps == ["ended"]


async def test_task_that_ends_by_itself_is_no_failure() -> None:
    failures: list[BaseException] = []

    async def end() -> None:
        return

    async with Background(on_failure=failures.append) as background:
        background.start(end(), name="short")
        await asyncio.sleep(0.001)

    assert failures == []
