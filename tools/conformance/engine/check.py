"""What a check of the engine contract is, and the books that checks are written in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from services.worker.engine.base import ConstraintKind, EngineAbilities
from tools.conformance.engine.harness import Harness
from tools.conformance.verdict import CannotShow

Case = TypeVar("Case")
Run = Callable[[Harness], Awaitable[None]]
RunCase = Callable[[Harness, Case], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Need:
    """An ability that a check is about. An engine that says it lacks it is not asked.

    Attributes:
        text: what it is.
        holds: whether an engine has it.
    """

    text: str
    holds: Callable[[EngineAbilities], bool]


LOGPROBS = Need("log-probabilities", lambda can: can.max_top_logprobs is not None)
TOP_LOGPROBS = Need("alternatives", lambda can: bool(can.max_top_logprobs))
THREE_LOGPROBS = Need("three alternatives", lambda can: (can.max_top_logprobs or 0) >= 3)  # noqa: PLR2004
PROMPT_LOGPROBS = Need("log-probabilities of prompts", lambda can: can.prompt_logprobs)
LOGIT_BIAS = Need("bias", lambda can: can.logit_bias)
PENALTIES = Need("frequency and presence penalties", lambda can: can.penalties)
REPETITION_PENALTY = Need("repetition penalty", lambda can: can.repetition_penalty)
MIN_P = Need("min_p", lambda can: can.min_p)
MIN_OUTPUT_TOKENS = Need("least output", lambda can: can.min_output_tokens)
IGNORE_EOS = Need("going on behind the end of sequence", lambda can: can.ignore_eos)
PROMPT_CACHE = Need("prefix cache", lambda can: can.prompt_cache)
KV_EVENTS = Need("changes of the prefix cache", lambda can: can.kv_block_tokens > 0)
ADAPTERS = Need("LoRA adapters", lambda can: can.adapters)
EMBEDDINGS = Need("embeddings", lambda can: can.embedding_dimensions > 0)


def constraint(kind: ConstraintKind) -> Need:
    """The need for a kind of constraint."""
    return Need(f"constraint {kind.value}", lambda can: kind in can.constraints)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One promise of the engine protocol, and how it is looked at.

    Attributes:
        group: what it belongs to, as "stops".
        name: a sentence with underscores; with "[case]" behind it where there are several.
        sentence: what is promised.
        run: raises Mismatch or CannotShow.
        needs: abilities that it is about.
        ends_engine: no engine is left when it is over.
    """

    group: str
    name: str
    sentence: str
    run: Run
    needs: tuple[Need, ...] = ()
    ends_engine: bool = False

    async def perform(self, harness: Harness) -> None:
        """Makes the check on an engine.

        Raises:
            Mismatch: the engine does not keep what is promised.
            CannotShow: the engine says that it cannot, or something else is missing.
        """
        for need in self.needs:
            if not need.holds(harness.info.abilities):
                raise CannotShow(f"the engine says that it has no {need.text}")
        await self.run(harness)


class Book:
    """The checks of one group, in the order in which they were written."""

    def __init__(self, group: str) -> None:
        self._group = group
        self._checks: list[Check] = []

    def __iter__(self) -> Iterator[Check]:
        return iter(self._checks)

    def check(self, *needs: Need, ends_engine: bool = False) -> Callable[[Run], Run]:
        """Writes a check into the book.

        Args:
            needs: abilities that it is about.
            ends_engine: no engine is left when it is over.
        """

        def write(run: Run) -> Run:
            self._write(run, "", run, needs, ends_engine=ends_engine)
            return run

        return write

    def cases(
        self, cases: Mapping[str, Case], *needs: Need, ends_engine: bool = False
    ) -> Callable[[RunCase[Case]], RunCase[Case]]:
        """Writes one check for each case.

        Args:
            cases: what is handed to it, by what stands behind its name.
            needs: abilities that it is about.
            ends_engine: no engine is left when it is over.
        """

        def write(run: RunCase[Case]) -> RunCase[Case]:
            for name, case in cases.items():
                self._write(run, f"[{name}]", _bound(run, case), needs, ends_engine=ends_engine)
            return run

        return write

    def _write(
        self,
        described: Callable[..., object],
        suffix: str,
        run: Run,
        needs: tuple[Need, ...],
        *,
        ends_engine: bool,
    ) -> None:
        sentence = (described.__doc__ or "").strip().splitlines()[0]
        self._checks.append(
            Check(
                group=self._group,
                name=f"{described.__name__}{suffix}",
                sentence=sentence,
                run=run,
                needs=needs,
                ends_engine=ends_engine,
            )
        )


def _bound(run: RunCase[Case], case: Case) -> Run:
    async def bound(harness: Harness) -> None:
        await run(harness, case)

    return bound
