"""An engine whose child process does not do what it should."""

from __future__ import annotations

import asyncio
import sys
from array import array
from pathlib import Path

import pytest

from libs.loop import EventLoop
from services.worker.engine.base import Ended, EndReason, EngineRequest, Sampling
from services.worker.engine.child_engine import ChildEngine
from services.worker.engine.child_processes import ChildProgram
from services.worker.engine.wire import Counters, Kind, Report, pack_step

PATIENCE_S = 10.0
FRAME = 5
DEAF = """
import socket, sys, time
from services.worker.engine.base import EngineInfo
from services.worker.engine.wire_facts import pack_ready

connection = socket.socket(fileno=int(sys.argv[1]))
info = EngineInfo(engine="deaf", version="1", context_length=1 << 20, max_running=8,
                  vocabulary_size=9, digest="", is_deterministic=False)
connection.sendall(pack_ready(info, None))
time.sleep(300)
"""
LONG = EngineRequest(
    prompt_ids=(1,) * (1 << 20),
    max_output_tokens=1,
    sampling=Sampling(temperature=0, top_p=1, top_k=0, seed=0),
)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ChildProgram:
    """A child that is ready and then neither reads nor ends."""
    (tmp_path / "deaf_engine_of_a_test.py").write_text(DEAF, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return ChildProgram(module="deaf_engine_of_a_test", name="deaf", exit_timeout_s=0.05)


@pytest.mark.skipif(sys.platform == "win32", reason="needs unix sockets")
@pytest.mark.parametrize("kind", [asyncio.SelectorEventLoop, EventLoop], ids=["asyncio", "ours"])
def test_an_engine_that_reads_nothing_can_be_stopped_whatever_waits_for_it(
    program: ChildProgram, kind: type[asyncio.AbstractEventLoop]
) -> None:
    async def stop_it() -> None:
        engine = ChildEngine(program, {}, start_timeout_s=PATIENCE_S)
        await engine.start()
        engine.submit(1, LONG)
        async with asyncio.timeout(PATIENCE_S / 2):
            await engine.stop()

    with asyncio.Runner(loop_factory=kind) as runner:
        runner.run(stop_it())


ROW = Report(lanes=array("q", [1]).tobytes(), token_ids=array("i", [7]).tobytes())


@pytest.mark.parametrize(
    ("report", "steps"),
    [
        (Report(), 1),
        (ROW, 1),
        (Report(ended=[Ended(1, EndReason.END_OF_SEQUENCE)]), 1),
        (Report(ended=[Ended(1, EndReason.FAILED), Ended(2, EndReason.MAX_TOKENS)]), 1),
        (Report(ended=[Ended(1, EndReason.FAILED)]), 0),
        (Report(ended=[Ended(1, EndReason.ABORTED), Ended(2, EndReason.FAILED)]), 0),
    ],
)
def test_what_ends_before_the_engine_has_seen_it_is_no_step(
    program: ChildProgram, report: Report, steps: int
) -> None:
    engine = ChildEngine(program, {}, start_timeout_s=PATIENCE_S)
    frame = pack_step(Counters(), report)

    engine.on_frame(Kind.STEP, frame[FRAME:])
    engine._death = None

    assert engine.load().steps == steps
