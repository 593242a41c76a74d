"""The bare LLM API under the same load: python -m tools.gpu_check.bare, in the engine's Python.

Reads a job from the first line of standard input, writes one line with MARK and the runs, and ends
with the next line. Has the arguments that the adapter gives the engine, token ids in and out and no
text: nothing of the suite is in the way.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
import time
from typing import Any

from services.worker.engine.trtllm_api import Llm
from services.worker.engine.trtllm_arguments import llm_arguments
from services.worker.engine.trtllm_surface import Surface, detect
from tools.gpu_check.workload import Run, Workload, median

MARK = "GPU_CHECK "
_WARM_TOKENS = 8


class Bare:
    """An LLM object and the requests that it gets.

    Args:
        llm: loaded.
        surface: of it.
        work: how much is asked for.
    """

    def __init__(self, llm: Llm, surface: Surface, work: Workload) -> None:
        self._llm = llm
        self._surface = surface
        self._work = work
        self._tokens = 0
        self._firsts: list[float] = []
        self._failures: dict[str, int] = {}

    async def run(self, streams: int) -> Run:
        """All streams at the same time, each with its requests one after the other."""
        prompts = [self._work.prompts(streams, stream) for stream in range(streams)]
        await asyncio.gather(*(self._request(own[-1], _WARM_TOKENS) for own in prompts))
        self._tokens, self._firsts, self._failures = 0, [], {}
        started_s = time.perf_counter()
        await asyncio.gather(*(self._stream(own[:-1]) for own in prompts))
        return Run(
            streams=streams,
            tokens=self._tokens,
            seconds=time.perf_counter() - started_s,
            first_token_s=median(self._firsts),
            failures=self._failures,
        )

    async def _stream(self, prompts: list[list[int]]) -> None:
        for prompt in prompts:
            await self._request(prompt, self._work.output_tokens)

    async def _request(self, prompt: list[int], tokens: int) -> None:
        started_s = time.perf_counter()
        keywords: dict[str, object] = {"max_tokens": tokens, "temperature": 1.0, "top_p": 1.0}
        sampling = self._surface.sampling.make(
            **keywords, top_k=0, seed=1, ignore_eos=True, detokenize=False
        )
        told = 0
        try:
            output = self._llm.generate_async(
                inputs=prompt, sampling_params=sampling, streaming=True
            )
            async for result in output:
                if not told:
                    self._firsts.append(time.perf_counter() - started_s)
                told = len(result.outputs[0].token_ids)
        except Exception as error:  # noqa: BLE001 - counted; the comparison says so
            name = type(error).__name__
            self._failures[name] = self._failures.get(name, 0) + 1
        self._tokens += told


async def compare(job: dict[str, Any]) -> list[Run]:
    """Loads the engine and makes all runs."""
    surface = detect()
    arguments = llm_arguments(job["settings"], surface)
    llm = await asyncio.to_thread(lambda: surface.llm(**arguments))
    fields = {**job["work"], "streams": tuple(job["work"]["streams"])}
    work = Workload(**fields)
    return [await Bare(llm, surface, work).run(streams) for streams in work.streams]


def main() -> None:
    """Makes the job; ends the process at once: a shutdown of the engine may hang."""
    job = json.loads(sys.stdin.readline())
    runs = asyncio.run(compare(job))
    print(f"\n{MARK}{json.dumps([dataclasses.asdict(run) for run in runs])}", flush=True)
    # Until then whoever started this can see which processes are the engine's.
    sys.stdin.readline()
    os._exit(0)


if __name__ == "__main__":
    main()
