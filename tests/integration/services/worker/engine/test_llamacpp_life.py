"""How the llamacpp engine starts, refuses to start, dies and stops."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from libs.testing.eventually import eventually
from services.worker.engine.base import (
    Ended,
    EndReason,
    EngineDied,
    EngineRequest,
    EngineStartError,
    Sampling,
)
from services.worker.engine.llamacpp import LlamaCppEngine
from services.worker.engine.wire import pack_submit

ROOT = Path(__file__).parents[5]
MODEL = ROOT / "services" / "worker" / "models" / "maas-tiny-story.gguf"
PATIENCE_S = 30.0
LONG = EngineRequest(
    prompt_ids=tuple(range(100, 120)),
    max_output_tokens=900,
    ignore_eos=True,
    sampling=Sampling(temperature=0, top_p=1, top_k=0, seed=0),
)


@pytest.fixture
async def engine() -> AsyncIterator[LlamaCppEngine]:
    engine = LlamaCppEngine(MODEL, capacity=2, threads=1)
    await engine.start()
    yield engine
    await engine.stop()


def process_id_of(engine: LlamaCppEngine) -> int:
    assert engine._process is not None
    return engine._process.pid


def is_gone(process_id: int) -> bool:
    """Whether a process does not run any more; nobody need have waited for it."""
    try:
        state = Path(f"/proc/{process_id}/stat").read_text("utf-8").rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return True
    return state in "ZX"


async def until_dead(engine: LlamaCppEngine) -> str:
    """What the engine says once it is gone."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await engine.next_step()
            except EngineDied as error:
                return str(error)


async def test_the_context_is_the_trained_length_when_none_is_asked_for() -> None:
    engine = LlamaCppEngine(MODEL, capacity=1, threads=1)
    ticks = 0

    starting = asyncio.ensure_future(engine.start())
    while not starting.done():
        await asyncio.sleep(0.001)
        ticks += 1

    assert (await starting).context_length == 1024
    assert ticks > 10, "the event loop was blocked"
    await engine.stop()


async def test_a_child_of_another_version_refuses_to_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after an update of the files under a running worker."""
    monkeypatch.setattr("services.worker.engine.child_engine.VERSION", 1)
    engine = LlamaCppEngine(MODEL, capacity=1, threads=1)

    with pytest.raises(EngineStartError, match="restart it"):
        await engine.start()


async def test_a_killed_child_is_noticed_within_a_second(engine: LlamaCppEngine) -> None:
    engine.submit(1, LONG)
    await engine.next_step()

    os.kill(process_id_of(engine), signal.SIGKILL)
    killed = time.perf_counter()
    message = await until_dead(engine)

    assert time.perf_counter() - killed < 1
    assert message == "the llama.cpp process was killed by SIGKILL"
    with pytest.raises(EngineDied, match="SIGKILL"):
        engine.submit(2, LONG)
    engine.abort(1)
    assert engine.load().running is None
    assert engine._process is not None
    assert engine._process.returncode == -signal.SIGKILL


async def test_the_last_words_of_a_child_are_told(engine: LlamaCppEngine) -> None:
    """Any exception in the child will do; this one comes from half a frame."""
    assert engine._transport is not None
    frame = pack_submit(1, LONG)
    engine._transport.write((len(frame) - 9).to_bytes(4, sys.byteorder) + frame[4:-4])

    message = await until_dead(engine)

    assert message == (
        "the llama.cpp process exited with status 1: "
        "ValueError: the columns of a submit frame do not fit its counts"
    )


async def test_an_aborted_lane_produces_at_most_the_step_in_progress(
    engine: LlamaCppEngine,
) -> None:
    """The child is halted, so that what it does after the abort can be counted."""
    for lane in (1, 2, 3):
        engine.submit(lane, LONG)
    running: list[int] = []
    while len(running) < 2:
        running += [event.lane for event in (await engine.next_step()).prefilled]
    os.kill(process_id_of(engine), signal.SIGSTOP)
    seen = []
    try:
        while True:
            async with asyncio.timeout(0.2):
                seen += (await engine.next_step()).lanes
    except TimeoutError:
        pass

    engine.abort(1)
    os.kill(process_id_of(engine), signal.SIGCONT)
    after: list[int] = []
    ended: list[Ended] = []
    prefilled: list[int] = []
    async with asyncio.timeout(PATIENCE_S):
        while not (ended and prefilled):
            batch = await engine.next_step()
            after += batch.lanes
            ended += batch.ended
            prefilled += [event.lane for event in batch.prefilled]

    assert ended == [Ended(1, EndReason.ABORTED)]
    assert after.count(1) <= 1
    assert prefilled == [3], "the waiting lane got the slot"
    assert engine.load().running == 2


async def test_stop_ends_the_child_and_may_be_repeated(engine: LlamaCppEngine) -> None:
    engine.submit(1, LONG)
    await engine.next_step()
    waiting = asyncio.ensure_future(until_dead(engine))

    started = time.perf_counter()
    await asyncio.gather(engine.stop(), engine.stop())
    await engine.stop()

    assert time.perf_counter() - started < 3
    assert is_gone(process_id_of(engine))
    assert await waiting == "the engine was stopped"
    with pytest.raises(EngineDied, match="stopped"):
        engine.submit(2, LONG)


async def test_stop_ends_a_child_that_does_not_react(engine: LlamaCppEngine) -> None:
    os.kill(process_id_of(engine), signal.SIGSTOP)

    async with asyncio.timeout(5):
        await engine.stop()

    assert is_gone(process_id_of(engine))


async def test_an_engine_that_was_never_started_can_be_stopped() -> None:
    engine = LlamaCppEngine(MODEL, capacity=1, threads=1)

    await engine.stop()

    with pytest.raises(EngineDied):
        engine.submit(1, LONG)
    with pytest.raises(EngineDied):
        await engine.next_step()


async def test_the_child_ignores_the_signals_of_the_terminal(engine: LlamaCppEngine) -> None:
    """The worker drains on them, and needs its engine to."""
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process_id_of(engine), number)

    engine.submit(1, LONG)

    assert (await engine.next_step()).prefilled


START_AND_TELL = """
import asyncio, sys
from pathlib import Path
from services.worker.engine.llamacpp import LlamaCppEngine

async def main():
    engine = LlamaCppEngine(Path(sys.argv[1]), capacity=1, threads=1)
    await engine.start()
    print(engine._process.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def start_child_and_kill_its_parent() -> int:
    """Returns the process id of a halted engine child whose parent was killed just now."""
    with subprocess.Popen(
        [sys.executable, "-c", START_AND_TELL, str(MODEL)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, signal.SIGSTOP)
        parent.kill()
    return child


async def test_the_child_dies_with_its_parent() -> None:
    """Even while it is halted, and so does not see its socket close."""
    child = await asyncio.to_thread(start_child_and_kill_its_parent)

    await eventually(lambda: is_gone(child), within_s=2)


async def test_a_file_that_is_no_model_fails_the_start(tmp_path: Path) -> None:
    path = tmp_path / "truncated.gguf"
    path.write_bytes(MODEL.read_bytes()[:2_000_000])
    engine = LlamaCppEngine(path, capacity=1, threads=1)

    with pytest.raises(EngineStartError, match=r"cannot load .*truncated\.gguf.*file bounds"):
        await engine.start()

    assert is_gone(process_id_of(engine))
    with pytest.raises(EngineDied):
        await engine.next_step()


async def test_a_start_that_takes_too_long_is_given_up() -> None:
    engine = LlamaCppEngine(MODEL, capacity=1, threads=1, start_timeout_s=0.01)

    with pytest.raises(EngineStartError, match=r"not loaded within 0\.01 s"):
        await engine.start()

    assert is_gone(process_id_of(engine))


async def test_a_start_that_is_cancelled_leaves_no_child() -> None:
    engine = LlamaCppEngine(MODEL, capacity=1, threads=1)
    starting = asyncio.ensure_future(engine.start())
    await asyncio.sleep(0)  # The child is there when start() waits for the first time.

    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)

    assert starting.cancelled()
    assert is_gone(process_id_of(engine))


async def test_a_child_that_dies_while_it_loads_fails_the_start() -> None:
    engine = LlamaCppEngine(MODEL, capacity=1, threads=1)
    starting = asyncio.ensure_future(engine.start())
    await asyncio.sleep(0)  # The child is there when start() waits for the first time.

    os.kill(process_id_of(engine), signal.SIGKILL)

    with pytest.raises(EngineStartError, match="killed by SIGKILL while it loaded the model"):
        await starting


async def test_an_engine_starts_only_once(engine: LlamaCppEngine) -> None:
    with pytest.raises(EngineStartError, match="only once"):
        await engine.start()
    engine.submit(1, LONG)
    assert (await engine.next_step()).prefilled
