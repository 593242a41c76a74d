"""What a case works with: a suite, clients that count what they get, and the audit at its end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime

import grpc
from maas.billing.v1 import ledger_pb2
from maas.billing.v1 import price_service_pb2 as price_pb
from maas.billing.v1.price_service_pb2_grpc import PriceServiceStub

from libs.errors import MaasError
from libs.units import Rates
from tools.ask import read_variables
from tools.chaos.audit import OVER_MAX, Attempt, End, Kind, audit
from tools.chaos.books import Books, reconcile
from tools.chaos.load import PROMPT, channel
from tools.conformance.client import Refusal, Tenant
from tools.conformance.frames import Transcript
from tools.conformance.money_customer import usd
from tools.conformance.operator import within
from tools.conformance.verdict import Findings, Mismatch, expect
from tools.local.place import State
from tools.local.temporary import temporary_suite

CALL_S = 90.0
"""Deadline of a stream: longer than anything that a case takes away."""
ASK_S = 15.0
"""Deadline of a request that is expected to be refused at once."""
WELL_S = 60.0
"""Longest time until a process that was struck does its work again."""
DRAIN_S = 30.0
"""Longest time until all is settled and nothing is held, once nothing is wrong any more."""
POLL_S = 0.05
REST_S = 0.2
"""Between two requests of a client."""
STEP_S = 0.02
"""Of the simulated engine: a token of each stream."""
_FLAGS = (
    *("--engine", "sim", "--workers", "2", "--capacity", "32", "--step", f"{STEP_S * 1000:g}ms"),
    *("--set", "gateway.replay_window=10s"),
)


class Ground:
    """A suite for cases.

    Attributes:
        state: where it keeps what.
        findings: what the present case has shown.
        attempts: of all clients, of all cases.
    """

    def __init__(
        self,
        state: State,
        front: grpc.aio.Channel,
        back: grpc.aio.Channel,
    ) -> None:
        self._variables = variables = read_variables(state)
        key, model = variables["MAAS_API_KEY"], variables["MAAS_MODEL"]
        self.state = state
        self.findings = Findings()
        self.attempts: list[Attempt] = []
        self._tenant = Tenant(front, key, model)
        self._administrator = Tenant(back, variables["MAAS_ADMIN_KEY"], model)
        self._books = Books(back, Tenant(back, key, model), self._administrator)
        self._prices = PriceServiceStub(back)
        self._numbers = itertools.count(1)
        self._forgiven: set[str] = set()

    async def price(self, price_id: str, rates: Rates, effective_time: datetime) -> None:
        """Makes a price of the offering."""
        price = ledger_pb2.Price(offering=f"offerings/{self._tenant.model}")
        price.input_price_per_million.CopyFrom(usd(rates.input_price))
        price.output_price_per_million.CopyFrom(usd(rates.output_price))
        price.effective_time.FromDatetime(effective_time)
        request = price_pb.CreatePriceRequest(price_id=price_id, price=price)
        await self._administrator.call(self._prices.CreatePrice, request)

    # ---- clients

    async def stream(
        self, tokens: int, *, timeout_s: float = CALL_S, is_keyed: bool = True
    ) -> Answer:
        """Reads one generation as far as it comes; never raises for how it ends.

        Args:
            tokens: of its output.
            timeout_s: deadline of the call, seconds.
            is_keyed: with a request_id, by which the audit finds it whatever the client knows.
        """
        number = next(self._numbers)
        loop = asyncio.get_running_loop()
        key = f"case-{number}" if is_keyed else ""
        attempt = Attempt(key or f"unkeyed-{number}", Kind.STREAM, start_s=loop.time())
        answer = Answer(attempt)
        self.attempts.append(attempt)
        spec = self._tenant.spec(PROMPT, tokens, seed=number)
        try:
            async with self._tenant.stream(spec, request_id=key, timeout_s=timeout_s) as reading:
                while await reading.read() is not None:
                    _note(attempt, reading.transcript)
                _note(attempt, reading.transcript)
        except Refusal as refusal:
            attempt.end = End.CUT if attempt.generation_id else End.REFUSED
            attempt.cause = str(refusal)
            answer.refusal = refusal
        finally:
            attempt.end_s = loop.time()
        return answer

    async def keep_asking(
        self, tokens: int, until: asyncio.Event, *, is_keyed: bool = True
    ) -> list[Answer]:
        """Asks one after the other until told to stop; each is read to its end."""
        answers = []
        while not until.is_set():
            answers.append(await self.stream(tokens, timeout_s=ASK_S, is_keyed=is_keyed))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REST_S):
                    await until.wait()
        return answers

    async def begun(self, count: int) -> None:
        """Waits until the clients that came last have got their first frame.

        Raises:
            Mismatch: they have not in time.
        """
        last = self.attempts[-count:]

        async def have_begun() -> bool:
            return all(attempt.generation_id for attempt in last)

        expect(await within(WELL_S, have_begun), f"{count} streams have not begun")

    def log_of(self, name: str) -> str:
        """What a process has logged."""
        return (self.state.logs / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    # ---- the end

    async def served(self, within_s: float = WELL_S) -> None:
        """Waits until a request is served.

        Raises:
            Mismatch: none was in time.
        """

        async def is_served() -> bool:
            return (await self.stream(5, timeout_s=ASK_S)).attempt.end is End.CLEAN

        expect(await within(within_s, is_served), f"no request was served within {within_s:g} s")

    async def at_rest(self) -> None:
        """Waits until nothing is held.

        Raises:
            Mismatch: something was for too long.
        """

        async def is_at_rest() -> bool:
            return not await self._books.held()

        expect(await within(DRAIN_S, is_at_rest), f"money was held for {DRAIN_S:g} s")

    async def settled(self, within_s: float = DRAIN_S) -> float:
        """Waits until every generation has its record and nothing is held; how long it took.

        Raises:
            Mismatch: it was not so in time.
        """
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        state = ""
        while loop.time() - start_s < within_s:
            state = await self._missing()
            if not state:
                return loop.time() - start_s
            await asyncio.sleep(4 * POLL_S)
        raise Mismatch(f"after {within_s:g} s {state}")

    async def _missing(self) -> str:
        started = {item.generation_id for item in self.attempts} - {""}
        try:
            held = await self._books.held()
            settled = {record.generation_id for record in await self._books.records()}
        except (Refusal, MaasError) as error:
            return str(error)
        if not held and started <= settled:
            return ""
        return f"{held} nanos are held, {len(started - settled)} generations not settled"

    async def forgive(self, answers: Sequence[Answer]) -> int:
        """Leaves generations out of the audit that may have been lost; returns how many were.

        Raises:
            Mismatch: one is settled twice, or for more than its client can have got.
        """
        records = await self._books.records()
        lost = 0
        for answer in answers:
            own = [item for item in records if item.request_id == answer.attempt.request_id]
            lost += not own
            expect(len(own) <= 1, f"{answer.attempt.request_id} was settled {len(own)} times")
            for record in own:
                most = answer.attempt.received + OVER_MAX
                expect(record.output_tokens <= most, f"{record.generation_id} counts too much")
            self._forgiven.add(answer.attempt.request_id)
            self.attempts.remove(answer.attempt)
        return lost

    async def audit(self) -> str:
        """Compares all that clients got with all that was recorded; what it looked at.

        Raises:
            Mismatch: something is not as it must be.
        """
        by_generation = {item.generation_id: item.request_id for item in self.attempts}
        records = [
            # The audit knows requests by their ids.
            replace(item, request_id=item.request_id or by_generation.get(item.generation_id, ""))
            for item in await self._books.records()
            if item.request_id not in self._forgiven
        ]
        found = audit(self.attempts, records)
        faults = list(found.faults)
        if total := await self._books.ledger_sum():
            faults.append(f"the ledger sums to {total} nanos")
        variables = self._variables
        faults += await reconcile(variables["MAAS_BILLING"], variables["MAAS_ADMIN_KEY"])
        expect(not faults, "; ".join(faults))
        return f"{len(records)} records are what their clients got"


@dataclass(slots=True)
class Answer:
    """One generation as its client saw it.

    Attributes:
        attempt: for the audit.
        refusal: how it failed; None when it did not.
    """

    attempt: Attempt
    refusal: Refusal | None = None

    @property
    def took_s(self) -> float:
        """Seconds from the request to its end."""
        return self.attempt.end_s - self.attempt.start_s


def _note(attempt: Attempt, transcript: Transcript) -> None:
    if transcript.started is not None:
        attempt.generation_id = transcript.started.generation_id
    attempt.received = transcript.output_tokens
    if transcript.finished is not None:
        attempt.input_tokens = transcript.finished.usage.input_tokens
        attempt.charge_nanos = transcript.finished.charge.nanos
        attempt.end = End.CLEAN


@contextlib.contextmanager
def own_ground(*settings: str, flags: Sequence[str] = ()) -> Iterator[State]:
    """Starts a suite for cases; stopped and removed at the end.

    Args:
        settings: "section.key=value" of processes.
        flags: more flags of `make run`.

    Raises:
        SuiteFailure: it did not start.
    """
    chosen = [part for setting in settings for part in ("--set", setting)]
    with temporary_suite([*_FLAGS, *chosen, *flags]) as state:
        yield state


@asynccontextmanager
async def at(state: State) -> AsyncIterator[Ground]:
    """Connects to a suite."""
    variables = read_variables(state)
    async with AsyncExitStack() as stack:
        front = await stack.enter_async_context(channel(variables["MAAS_ENDPOINT"]))
        back = await stack.enter_async_context(channel(variables["MAAS_BILLING"]))
        yield Ground(state, front, back)
