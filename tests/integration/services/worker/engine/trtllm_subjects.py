"""What the pitfalls of TensorRT-LLM are tried on: an adapter, whichever, and what it tells.

A check sees a `Subject` and a `Bench` that makes subjects. There are two kinds of subjects: the
engine's own adapter, as its child process runs it but for the process itself, and the naive one.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import importlib
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from services.worker.engine.base import (
    Adapter,
    Ended,
    EndReason,
    EngineAbilities,
    EngineRequest,
    Lane,
    Sampling,
)
from services.worker.engine.kv_events import KvEvent, KvStored, chain
from services.worker.engine.trtllm_surface import QUIET
from tests.standins.tiny_hf_model import TinyModel, write_adapter

STANDINS = Path(__file__).parents[4] / "standins"
VARIABLE = "MAAS_STANDIN_TRTLLM"
OLD, NEW, NEWEST = "1.2.1", "1.3.0rc14", "1.4.0rc1"

PROMPT = (72, 101, 108, 108, 111)
GREEDY = Sampling(temperature=0, top_p=1, top_k=0, seed=0)
CAPACITY = 16
BLOCK_TOKENS = 16
PATIENCE_S = 10.0
"""Until something is told that has to be told."""
BLOCKS_S = 0.1
"""For how long something blocks a thread. An event loop that is left alone turns meanwhile."""
TICK_S = 0.005
TICKS_LEAST = 3
_POLL_S = 0.001
_HANG_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What an engine is started with.

    Attributes:
        version: of TensorRT-LLM.
        section: [worker.trtllm] of a configuration, besides what the adapters have in common.
        standin: settings of the stand-in, its faults among them.
        polls: statistics and events are fetched.
        model: that it loads.
        folder: for adapters.
    """

    version: str
    section: Mapping[str, object]
    standin: Mapping[str, object]
    polls: bool
    model: TinyModel
    folder: Path


@dataclass(slots=True)
class Told:
    """What was told of one execution.

    Attributes:
        token_ids: output.
        logprobs: of the output's tokens; empty where nobody asked.
        cached: tokens of the prompt that the cache had; None until that is told.
        ended: its end; None while it runs.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    cached: int | None = None
    ended: Ended | None = None


class Subject(abc.ABC):
    """An adapter around one engine.

    Attributes:
        llm: the engine.
        abilities: what it promises.
        told: by lane.
        journal: who began and who ended, in order.
        deaths: why it said that the engine is gone.
        events: changes of the prefix cache.
        crash: what it died of itself.
    """

    def __init__(self) -> None:
        self.llm: Any = None
        self.abilities = EngineAbilities()
        self.told: dict[Lane, Told] = {}
        self.journal: list[tuple[str, Lane]] = []
        self.deaths: list[str] = []
        self.events: list[KvEvent] = []
        self.crash: BaseException | None = None
        self._lanes = 0

    def submit(self, request: EngineRequest) -> Lane:
        """Starts an execution."""
        self._lanes += 1
        self.told[self._lanes] = Told()
        self._submit(self._lanes, request)
        return self._lanes

    def submit_outputs(self, request: EngineRequest, count: int) -> list[Lane]:
        """Starts an execution of several outputs: one request of the engine for each."""
        seed = request.sampling.seed
        return [
            self.submit(replace(request, sampling=replace(request.sampling, seed=seed + number)))
            for number in range(count)
        ]

    def begin(self, lane: Lane, cached: int) -> None:
        """Takes note of a first token."""
        self.told[lane].cached = cached
        self.journal.append(("begun", lane))

    def end(self, ended: Ended) -> None:
        """Takes note of an end: there is one."""
        told = self.told[ended.lane]
        assert told.ended is None, "an execution ended twice"
        told.ended = ended
        self.journal.append(("ended", ended.lane))

    @abc.abstractmethod
    async def open(self) -> None:
        """Loads the engine."""

    @abc.abstractmethod
    def _submit(self, lane: Lane, request: EngineRequest) -> None:
        """Starts an execution."""

    @abc.abstractmethod
    def abort(self, lane: Lane) -> None:
        """Stops an execution soon."""

    @abc.abstractmethod
    async def load_adapter(self, adapter: Adapter) -> None:
        """Loads an adapter, or raises AdapterUnusable."""

    @property
    @abc.abstractmethod
    def running(self) -> int | None:
        """Executions in the batch, as it tells; None when it does not know."""

    @property
    @abc.abstractmethod
    def kv_used(self) -> int | None:
        """Tokens in the KV cache, as it tells; None when it does not know."""

    @property
    @abc.abstractmethod
    def iteration(self) -> int | None:
        """Of the engine, that it has heard of last."""

    @abc.abstractmethod
    async def noticed(self) -> str:
        """Looks at the engine as it does every so often; why it cannot go on, or nothing."""

    @abc.abstractmethod
    def noticed_meanwhile(self) -> str:
        """The same from another thread, while the event loop may stand still."""

    @abc.abstractmethod
    async def shut_down(self) -> None:
        """Ends the engine, as far as it lets itself be ended."""


Make = Callable[[Setup], Subject]


@dataclass
class Bench:
    """What a check works with.

    Attributes:
        model: that is loaded.
        folder: for files; made when it is needed.
        patience_s: until what has to be told is told.
        sets_environment: sets a variable until the test is over.
        make: makes a subject.
        lent: a subject that checks share, if they may and there is one.
        reference: an engine without faults.
        process: runs an adapter in a process of its own until that ends; returns whether it did
            within the patience.
    """

    model: TinyModel
    folder: Path
    patience_s: float
    sets_environment: Callable[[str, str], None]
    make: Make
    lent: Subject | None
    reference: Reference
    process: Callable[[Bench], Awaitable[bool]]
    subjects: list[Subject] = field(default_factory=list)

    async def start(
        self,
        *faults: Mapping[str, object],
        version: str = OLD,
        section: Mapping[str, object] | None = None,
        polls: bool = False,
        **standin: object,
    ) -> Subject:
        """Starts an engine. The first request is its own: faults count from 2."""
        # What hangs for ever would hang the tests as well.
        standin = {"hang_s": _HANG_S, **standin}
        install(version, standin, self.sets_environment, faults)
        setup = Setup(
            version=version,
            section=section or {},
            standin=standin,
            polls=polls,
            model=self.model,
            folder=self.folder,
        )
        subject = self.make(setup)
        self.subjects.append(subject)
        await self.wait(subject.open())
        return subject

    async def plain(self) -> Subject:
        """An engine without faults, for checks that leave it as it was."""
        if self.lent is None:
            return await self.start()
        install(OLD, {}, self.sets_environment)
        return self.lent

    async def wait(self, work: Awaitable[None]) -> None:
        """Waits for something, not longer than the patience."""
        async with asyncio.timeout(self.patience_s):
            await work

    async def until(self, subject: Subject, is_so: Callable[[], object]) -> None:
        """Waits until something is so."""
        async with asyncio.timeout(self.patience_s):
            while not is_so():
                if subject.crash is not None:
                    raise subject.crash
                await asyncio.sleep(_POLL_S)

    async def ended(self, subject: Subject, lane: Lane) -> Told:
        """Waits for the end of an execution."""
        told = subject.told[lane]
        await self.until(subject, lambda: told.ended is not None)
        return told

    async def run(self, subject: Subject, request: EngineRequest) -> Told:
        """Runs an execution to its end."""
        return await self.ended(subject, subject.submit(request))

    async def says(self, subject: Subject, request: EngineRequest) -> list[int]:
        """The output of an execution."""
        return (await self.run(subject, request)).token_ids

    async def reason(self, subject: Subject, request: EngineRequest) -> EndReason:
        """Why an execution ended."""
        ended = (await self.run(subject, request)).ended
        assert ended is not None
        return ended.reason

    async def serves(self, subject: Subject) -> None:
        """States that an ordinary request is served."""
        assert await self.says(subject, ask(most=6)) == await self.reference.says(PROMPT, 6)

    def adapter(self, name: str, *, seed: int, rank: int = 4) -> Adapter:
        """Writes an adapter."""
        self.folder.mkdir(exist_ok=True)
        path = self.folder / name
        write_adapter(path, seed=seed, rank=rank)
        return Adapter(name=f"adapters/{name}", path=path, digest=f"sha256:{seed:064x}")

    async def close(self) -> None:
        """Ends all engines that were started."""
        for subject in self.subjects:
            await subject.shut_down()


class Reference:
    """What the model says, by the plainest use of the engine there is: no stream, no faults."""

    def __init__(self, model: TinyModel) -> None:
        self.model = model
        self._endings: dict[int, tuple[tuple[int, ...], list[int]]] = {}
        self._pairs: list[tuple[tuple[int, ...], list[int], int]] = []
        with pytest.MonkeyPatch.context() as patch:
            install(NEWEST, {}, patch.setenv)
            self._module = importlib.import_module("tensorrt_llm")
            self._llm = self._module.LLM(model=str(model.folder))
        self.encode: Callable[[str], list[int]] = lambda text: list(
            self._llm.tokenizer.encode(text, add_special_tokens=False)
        )
        self.decode: Callable[[list[int]], str] = lambda ids: str(
            self._llm.tokenizer.decode(ids, skip_special_tokens=True)
        )

    async def output(self, prompt: tuple[int, ...], most: int, **fields: object) -> Any:
        """The likeliest output, its end if it comes to it included, and all that is told of it."""
        given = {"max_tokens": most, "temperature": 0.0, "detokenize": False, **fields}
        params = self._module.SamplingParams(**given)

        def wait() -> Any:
            # In a thread without an event loop nothing has to be awaited.
            return self._llm.generate_async(inputs=list(prompt), sampling_params=params).result()

        result = await asyncio.to_thread(wait)
        return result.outputs[0]

    async def says(self, prompt: tuple[int, ...], most: int) -> list[int]:
        """The likeliest tokens, whatever would end them."""
        return list((await self.output(prompt, most, ignore_eos=True)).token_ids)

    async def ending(self, end_id: int) -> tuple[tuple[int, ...], list[int]]:
        """A prompt whose output ends by a token, and that output without it: two tokens at least.

        Raises:
            AssertionError: there is none; the model is another one.
        """
        if end_id not in self._endings:
            self._endings[end_id] = await self._find_ending(end_id)
        return self._endings[end_id]

    async def _find_ending(self, end_id: int) -> tuple[tuple[int, ...], list[int]]:
        others = set(self.model.eos_ids) - {end_id}
        for first in range(33, 240):
            prompt = (first, 33)
            output = await self.says(prompt, 24)
            if end_id in output[2:] and output.index(end_id) > 1:
                before = output[: output.index(end_id)]
                if others.isdisjoint(before):
                    return prompt, before
        raise AssertionError("no prompt gives such an output")

    async def pair(self) -> tuple[tuple[int, ...], list[int], int]:
        """A prompt, its output, and a place in it where the text of two tokens makes them again.

        Raises:
            AssertionError: there is none; the model is another one.
        """
        if not self._pairs:
            self._pairs.append(await self._find_pair())
        return self._pairs[0]

    async def _find_pair(self) -> tuple[tuple[int, ...], list[int], int]:
        for first in range(40, 120):
            prompt = (first, 33)
            whole = await self.says(prompt, 12)
            for at in range(2, len(whole) - 1):
                before, two = whole[:at], whole[at : at + 2]
                text = self.decode(two)
                # Not before, nor as a part of other tokens, nor behind an end.
                is_first = self.decode(whole).find(text) == len(self.decode(before))
                goes_on = set(self.model.eos_ids).isdisjoint(whole[: at + 2])
                if self.encode(text) == two and is_first and goes_on and two[0] not in before:
                    return prompt, whole, at
        raise AssertionError("no prompt gives such an output")

    def close(self) -> None:
        """Ends it."""
        self._llm.shutdown()


def ask(
    prompt: tuple[int, ...] = PROMPT,
    *,
    most: int = 8,
    sampling: Sampling = GREEDY,
    ignore_eos: bool = True,
    **fields: Any,
) -> EngineRequest:
    """An execution."""
    return EngineRequest(
        prompt_ids=prompt,
        max_output_tokens=most,
        sampling=sampling,
        ignore_eos=ignore_eos,
        **fields,
    )


def warm(seed: int) -> Sampling:
    """Draws, as protocols have it when nothing else is said."""
    return Sampling(temperature=1, top_p=1, top_k=0, seed=seed)


async def ticks_during(work: Awaitable[object]) -> int:
    """How often the event loop turned while something was awaited."""
    count = 0

    async def tick() -> None:
        nonlocal count
        while True:
            await asyncio.sleep(TICK_S)
            count += 1

    ticking = asyncio.create_task(tick())
    try:
        await work
    finally:
        ticking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ticking
    return count


def names_of(token_ids: list[int]) -> list[int]:
    """Names of the full blocks of a beginning."""
    names: list[int] = []
    for start in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        parent = names[-1] if names else None
        names.append(chain(parent, token_ids[start : start + BLOCK_TOKENS]))
    return names


def stored(events: list[KvEvent]) -> list[int]:
    """Names of all blocks that were told as stored."""
    return [name for event in events if isinstance(event, KvStored) for name in event.hashes]


async def ends(process: asyncio.subprocess.Process, within_s: float) -> bool:
    """Whether a process ends by itself; it is killed if not."""
    try:
        async with asyncio.timeout(within_s):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
        return False
    return True


_IMPORTED: dict[str, dict[str, ModuleType]] = {}


def install(
    version: str,
    standin: Mapping[str, object],
    sets_environment: Callable[[str, str], None],
    faults: tuple[Mapping[str, object], ...] = (),
) -> None:
    """Makes `import tensorrt_llm` find the stand-in in a version, and tells it what to do."""
    given = {"banner": False, **standin, "version": version, "faults": list(faults)}
    sets_environment(VARIABLE, json.dumps(given))
    for name in QUIET:
        # What is set by whoever imports it is undone.
        sets_environment(name, "0")
    forget()
    features = json.dumps([version, standin.get("features"), standin.get("detect")])
    sys.modules.update(_IMPORTED.get(features, {}))
    if features not in _IMPORTED:
        sys.path.insert(0, str(STANDINS))
        try:
            for name in ("tensorrt_llm", "torch"):
                importlib.import_module(name)
        finally:
            sys.path.remove(str(STANDINS))
        _IMPORTED[features] = {name: sys.modules[name] for name in list(sys.modules) if _ours(name)}


def forget() -> None:
    """Takes the stand-ins out of what has been imported."""
    for name in list(sys.modules):
        if _ours(name):
            del sys.modules[name]


def _ours(name: str) -> bool:
    return name.partition(".")[0] in {"tensorrt_llm", "torch"}
