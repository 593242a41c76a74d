"""How the stand-in fails: what is aborted, what hangs, what dies, what blocks."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.standins.conftest import HANG_S, PATIENCE_S, PROMPT, Load, Standin

OLD, NEW, NEWEST = "1.2.1", "1.3.0rc14", "1.4.0rc1"
SHORT_S = 0.015


async def hangs(result: Any) -> bool:
    """Whether nothing comes any more. What is under way may still come."""
    try:
        async with asyncio.timeout(SHORT_S):
            await result.aresult()
    except TimeoutError:
        return True
    return False


def rank_of(llm: Any) -> int:
    """The process that the engine has started."""
    pid: int = llm._executor.engine.process.pid
    return pid


def state_of(pid: int) -> str:
    """State of a process, as Linux has it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def until_wedged(llm: Any) -> None:
    """Waits until the engine has given up."""
    async with asyncio.timeout(PATIENCE_S):
        while not llm._executor.engine.is_stuck:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.001)


async def test_what_is_aborted_ends_later(plain: Standin) -> None:
    llm = plain.llm()
    result = plain.start(llm, max_tokens=200, ignore_eos=True)
    await anext(result)

    result.abort()
    result.abort()

    assert not result.finished
    assert (await result.aresult()).outputs[0].finish_reason == "cancelled"
    assert result.aborted()
    assert (await plain.run(llm)).finished


async def test_abort_may_be_ignored_or_fail(load: Load) -> None:
    standin = load(faults=[{"name": "abort_ignored", "request": 1}])
    llm = standin.llm()
    result = standin.start(llm, max_tokens=60, ignore_eos=True)
    await anext(result)

    result.abort()

    assert (await result.aresult()).outputs[0].finish_reason == "length"
    llm.shutdown()
    with pytest.raises(AttributeError):
        result.abort()


async def test_too_many_aborts_wedge_the_engine(load: Load) -> None:
    standin = load(faults=[{"name": "wedge_after_aborts", "aborts": 2}])
    llm = standin.llm()
    results = [standin.start(llm, max_tokens=200, ignore_eos=True) for _ in range(3)]

    results[0].abort()
    assert (await results[0].aresult()).outputs[0].finish_reason == "cancelled"
    results[1].abort()

    assert [await hangs(result) for result in results] == [False, True, True]


@pytest.mark.parametrize(("parameters", "reason"), [({}, None), ({"reason": "timeout"}, "timeout")])
async def test_a_finished_output_may_not_say_why(
    load: Load, parameters: dict[str, str], reason: str | None
) -> None:
    standin = load(faults=[{"name": "finish_reason", "request": 2, **parameters}])
    llm = standin.llm()

    first, second = [await standin.run(llm, ignore_eos=True) for _ in range(2)]

    assert first.outputs[0].finish_reason == "length"
    assert (second.outputs[0].finish_reason, second.finished) == (reason, True)


async def test_the_end_may_be_missing_from_the_tokens(load: Load) -> None:
    standin = load(faults=[{"name": "eos_missing", "every": True}])

    result = await standin.run(standin.llm(), max_tokens=200)

    assert result.outputs[0].finish_reason == "stop"
    assert standin.model.eos_id not in result.outputs[0].token_ids


async def test_behind_the_error_of_a_request_nothing_comes(load: Load) -> None:
    standin = load(faults=[{"name": "request_error", "request": 1, "tokens": 3}])
    llm = standin.llm()
    failing = standin.start(llm, ignore_eos=True)

    with pytest.raises(standin.name("tensorrt_llm.executor.utils.RequestError")):
        await failing.aresult()

    assert not failing.finished
    assert await hangs(failing)
    assert (await standin.run(llm)).finished


@pytest.mark.parametrize("kind", ["ValueError", "TypeError", "RequestError"])
async def test_calls_may_fail_at_once(load: Load, kind: str) -> None:
    standin = load(faults=[{"name": "call_error", "request": 1, "type": kind}])
    llm = standin.llm()

    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        standin.start(llm)

    assert type(caught.value).__name__ == kind
    assert (await standin.run(llm)).finished


async def test_one_request_may_hang_alone_or_with_all_others(load: Load, tmp_path: Path) -> None:
    switch = tmp_path / "wedge"
    faults = [
        {"name": "hang", "request": 1, "tokens": 2},
        {"name": "wedge", "when_file": str(switch)},
    ]
    standin = load(faults=faults)
    llm = standin.llm()

    stuck = standin.start(llm, ignore_eos=True)
    assert await hangs(stuck)
    assert (await standin.run(llm)).finished
    switch.touch()
    await until_wedged(llm)

    assert await hangs(standin.start(llm))


async def test_a_fatal_error_meets_who_reads_next_and_blocks_it(load: Load) -> None:
    """It comes out of a request that has nothing to do with it, and later out of a call."""
    fault = {"name": "fatal", "request": 1, "tokens": 2, "blocks_s": 0.05}
    standin = load(faults=[fault])
    llm = standin.llm()
    guilty = standin.start(llm, max_tokens=100, ignore_eos=True)
    unrelated = standin.start(llm, max_tokens=100, ignore_eos=True)

    started_s = time.monotonic()  # noqa: TID251 - of a real thread
    with pytest.raises(RuntimeError, match="CUDA error") as caught:
        await unrelated.aresult()

    assert time.monotonic() - started_s >= 0.05  # noqa: TID251 - of a real thread
    assert type(caught.value) is RuntimeError
    assert await hangs(guilty)
    assert llm._executor.is_shutdown()
    with pytest.raises(RuntimeError, match="shutting down"):
        standin.start(llm)


async def test_a_killed_rank_is_noticed_by_nobody(load: Load) -> None:
    """Requests hang, new ones are taken, the process is left unreaped, and shutdown() blocks."""
    standin = load(version=OLD)
    llm = standin.llm()
    result = standin.start(llm, max_tokens=200, ignore_eos=True)
    await anext(result)

    os.kill(rank_of(llm), signal.SIGKILL)
    await until_wedged(llm)

    assert await hangs(result)
    assert await hangs(standin.start(llm))
    assert not llm._executor.is_shutdown()
    assert state_of(rank_of(llm)) == "Z"
    started_s = time.monotonic()  # noqa: TID251 - of a real thread
    llm.shutdown()
    assert time.monotonic() - started_s >= HANG_S  # noqa: TID251 - of a real thread


async def test_newer_versions_tell_everybody_that_the_engine_is_dead(load: Load) -> None:
    standin = load(version=NEWEST, dead_after_s=0.05)
    llm = standin.llm()
    results = [standin.start(llm, max_tokens=200, ignore_eos=True) for _ in range(2)]
    dead = standin.name("tensorrt_llm.executor.EngineDeadError")

    os.kill(rank_of(llm), signal.SIGKILL)

    for result in results:
        with pytest.raises(dead):
            await asyncio.wait_for(result.aresult(), PATIENCE_S)
    assert llm._check_health() is False


async def test_a_rank_can_be_killed_at_a_token(load: Load) -> None:
    standin = load(faults=[{"name": "rank_killed", "request": 1, "tokens": 3}])
    llm = standin.llm()
    result = standin.start(llm, max_tokens=200, ignore_eos=True)

    assert await hangs(result)
    assert 3 <= len(result.outputs[0].token_ids) < 200


async def test_a_canary_without_salt_kills_a_rank_that_shares_attention(plain: Standin) -> None:
    llm = plain.llm(enable_attention_dp=True)
    salted = await plain.run(llm, [1], max_tokens=1, cache_salt="canary")

    bare = plain.start(llm, [1], max_tokens=1)

    assert salted.finished
    assert await hangs(bare)
    assert not llm._executor.engine.process.is_alive()


async def test_newer_versions_may_say_that_they_are_ill(load: Load) -> None:
    standin = load(version=NEW, faults=[{"name": "unhealthy"}])

    assert standin.llm()._check_health() is False


async def test_shutdown_may_fail_or_hang(load: Load) -> None:
    hanging = load(faults=[{"name": "shutdown_hang"}]).llm()
    started_s = time.monotonic()  # noqa: TID251 - of a real thread
    hanging.shutdown()
    assert time.monotonic() - started_s >= HANG_S  # noqa: TID251 - of a real thread

    failing = load(faults=[{"name": "shutdown_error"}]).llm()
    with pytest.raises(RuntimeError, match="not ended"):
        failing.shutdown()
    failing.shutdown()


async def test_shutdown_takes_the_rank_along(plain: Standin) -> None:
    llm = plain.llm()
    pid = rank_of(llm)

    llm.shutdown()

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(RuntimeError, match="shutting down"):
        plain.start(llm, PROMPT)


async def test_loading_may_fail(load: Load) -> None:
    standin = load(faults=[{"name": "load_error", "message": "no memory"}])

    with pytest.raises(RuntimeError, match="no memory"):
        standin.llm()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("load_hang", {}),
        ("call_slow", {"every": True, "s": HANG_S}),
        ("stats_block", {"s": HANG_S}),
    ],
)
async def test_calls_may_block(load: Load, name: str, parameters: dict[str, object]) -> None:
    standin = load(version=NEW, faults=[{"name": name, **parameters}])
    started_s = time.monotonic()  # noqa: TID251 - of a real thread

    llm = standin.llm(enable_iter_perf_stats=True)
    await standin.run(llm, max_tokens=1)
    assert len(llm.get_stats(timeout=1.0)) == 1

    assert time.monotonic() - started_s >= HANG_S  # noqa: TID251 - of a real thread
