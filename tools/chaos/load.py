"""Clients that count what they receive: streams and unary calls; some repeat, leave or detach."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager

import grpc
from maas.inference.v1 import generation_service_pb2 as generations

from libs.clock import SystemClock
from libs.errors import Code
from tools.chaos.audit import OVER_MAX, Attempt, End, Kind
from tools.conformance.client import Refusal, Tenant
from tools.conformance.frames import Transcript
from tools.conformance.verdict import Mismatch

CALL_S = 30.0
REST_S = (0.05, 0.3)
"""Between two requests of a client."""
REFUSED_S = (0.3, 0.9)
"""The same after a refusal."""
RESUMES_MAX = 100
REPEATS_MAX = 20
STREAM_TOKENS = (5, 300)
PROMPT = "Once upon a time a fox went through the snow and met"
_KINDS = {Kind.STREAM: 4, Kind.REPEAT: 2, Kind.UNARY: 2, Kind.CANCEL: 1, Kind.DETACH: 2}
_ANSWERS = {
    Code.UNAVAILABLE,
    Code.RESOURCE_EXHAUSTED,
    Code.DEADLINE_EXCEEDED,
    # Of what was detached or repeated: its gateway was lost, too late, settled, ended by a cut.
    Code.NOT_FOUND,
    Code.OUT_OF_RANGE,
    Code.ALREADY_EXISTS,
    Code.CANCELLED,
}
_CHANNEL = (
    # Gateways come back within a second or two.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
)


@asynccontextmanager
async def channel(endpoint: str) -> AsyncIterator[grpc.aio.Channel]:
    """A connection that is soon made again."""
    async with grpc.aio.insecure_channel(endpoint, options=list(_CHANNEL)) as found:
        yield found


class Load:
    """All clients.

    Attributes:
        attempts: every generation that was asked for.
        mismatches: what came and is not allowed.
    """

    def __init__(self, tenants: Mapping[str, Tenant], seed: int) -> None:
        """Prepares them.

        Args:
            tenants: a connection to each gateway, by the name of its process.
            seed: of what clients ask for.
        """
        self._tenants = tenants
        self._clock = SystemClock()
        self._seed = seed
        self._is_over = False
        self.attempts: list[Attempt] = []
        self.mismatches: list[str] = []

    async def run(self, clients: int) -> None:
        """Asks until `stop`, and then ends what runs."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(clients):
                tasks.create_task(self._client(number))

    def stop(self) -> None:
        """Asks for nothing new."""
        self._is_over = True

    async def _client(self, number: int) -> None:
        chance = random.Random(f"client {self._seed} {number}")  # noqa: S311 - no secret
        gateways = list(self._tenants)
        count = 0
        while not self._is_over:
            count += 1
            kind = chance.choices(list(_KINDS), list(_KINDS.values()))[0]
            # A client goes anywhere; a generation is at home where it began.
            gateway = chance.choice(gateways)
            for _ in range(REPEATS_MAX if kind is Kind.REPEAT else 1):
                attempt = await self._ask(f"chaos-{number}-{count}", kind, gateway)
                rest_s = REFUSED_S if attempt.end is End.REFUSED else REST_S
                await asyncio.sleep(chance.uniform(*rest_s))
                if not attempt.cause.startswith(Code.UNAVAILABLE.name):
                    break

    async def _ask(self, request_id: str, kind: Kind, gateway: str) -> Attempt:
        """Makes a request, or repeats it: its id says what is asked for."""
        chance = random.Random(f"request {self._seed} {request_id}")  # noqa: S311 - no secret
        loop = asyncio.get_running_loop()
        attempt = Attempt(request_id, kind, start_s=loop.time(), gateway=gateway)
        self.attempts.append(attempt)
        await self._try(attempt, chance)
        attempt.end_s = loop.time()
        attempt.ended = f"{self._clock.now():%H:%M:%S.%f}"
        return attempt

    async def _try(self, attempt: Attempt, chance: random.Random) -> None:
        ways: dict[Kind, Callable[[Attempt, random.Random], Coroutine[None, None, None]]] = {
            Kind.STREAM: self._stream,
            Kind.REPEAT: self._stream,
            Kind.UNARY: self._unary,
            Kind.CANCEL: self._cancel,
            Kind.DETACH: self._detach,
        }
        try:
            await ways[attempt.kind](attempt, chance)
        except Refusal as refusal:
            if attempt.end is not End.CLEAN:
                attempt.end = End.CUT if attempt.generation_id else End.REFUSED
            attempt.cause = f"{refusal.code.name}/{refusal.reason}"
            if not _is_answer(refusal):
                self.mismatches.append(f"{attempt.request_id} at {attempt.gateway}: {refusal}")
        except Mismatch as mismatch:
            attempt.cause = str(mismatch)
            self.mismatches.append(f"{attempt.request_id}: {mismatch}")

    async def _stream(self, attempt: Attempt, chance: random.Random) -> None:
        await self._read(attempt, chance, leave_after=None)

    async def _cancel(self, attempt: Attempt, chance: random.Random) -> None:
        await self._read(attempt, chance, leave_after=chance.randint(1, STREAM_TOKENS[1] // 2))

    async def _read(
        self, attempt: Attempt, chance: random.Random, *, leave_after: int | None
    ) -> None:
        tenant = self._tenants[attempt.gateway]
        spec = tenant.spec(PROMPT, chance.randint(*STREAM_TOKENS), seed=chance.getrandbits(31))
        async with tenant.stream(
            spec,
            request_id=attempt.request_id,
            timeout_s=CALL_S,
            may_merge=attempt.kind is Kind.REPEAT,
        ) as reading:
            while await reading.read() is not None:
                _note(attempt, reading.transcript)
                if leave_after is not None and attempt.received >= leave_after:
                    attempt.end = End.LEFT
                    break
            _note(attempt, reading.transcript)

    async def _unary(self, attempt: Attempt, chance: random.Random) -> None:
        # Released in one piece: as many tokens as a stream may be counted too many.
        tokens = chance.randint(1, OVER_MAX)
        tenant = self._tenants[attempt.gateway]
        spec = tenant.spec(PROMPT, tokens, seed=chance.getrandbits(31))
        answer = await tenant.generate(spec, request_id=attempt.request_id, timeout_s=CALL_S)
        attempt.generation_id = answer.generation_id
        attempt.received = len(answer.outputs[0].token_ids)
        attempt.input_tokens = answer.usage.input_tokens
        attempt.charge_nanos = answer.charge.nanos
        attempt.end = End.CLEAN

    async def _detach(self, attempt: Attempt, chance: random.Random) -> None:
        """Drops its call again and again, and resumes behind the last frame."""
        options = generations.StreamOptions(on_disconnect=generations.DISCONNECT_POLICY_CONTINUE)
        tenant = self._tenants[attempt.gateway]
        spec = tenant.spec(PROMPT, chance.randint(*STREAM_TOKENS), seed=chance.getrandbits(31))
        piece = chance.randint(10, 80)
        async with tenant.stream(
            spec, request_id=attempt.request_id, options=options, timeout_s=CALL_S
        ) as reading:
            transcript = reading.transcript
            until = piece
            while transcript.output_tokens < until and await reading.read() is not None:
                _note(attempt, transcript)
        for _ in range(RESUMES_MAX):
            _note(attempt, transcript)
            if transcript.finished is not None or not attempt.generation_id:
                return
            await asyncio.sleep(chance.uniform(0.0, 0.2))
            until = transcript.output_tokens + piece
            with _cuts_expected():
                async with tenant.resume(
                    attempt.generation_id, transcript, timeout_s=CALL_S
                ) as resumed:
                    while transcript.output_tokens < until and await resumed.read() is not None:
                        _note(attempt, transcript)


@contextmanager
def _cuts_expected() -> Iterator[None]:
    """Lets a connection be lost: a detached generation is asked for again, until somebody answers.

    Raises:
        Refusal: somebody has.
    """
    try:
        yield
    except Refusal as refusal:
        if refusal.code is not Code.UNAVAILABLE or refusal.reason:
            raise


def _is_answer(refusal: Refusal) -> bool:
    """Whether a refusal may come of what was struck; a lost connection has no reason of ours."""
    return refusal.code in _ANSWERS or not (refusal.reason or refusal.code is Code.UNKNOWN)


def _note(attempt: Attempt, transcript: Transcript) -> None:
    """Copies what has been received by now."""
    if transcript.started is not None:
        attempt.generation_id = transcript.started.generation_id
    attempt.received = transcript.output_tokens
    if transcript.finished is not None:
        attempt.input_tokens = transcript.finished.usage.input_tokens
        attempt.charge_nanos = transcript.finished.charge.nanos
        attempt.end = End.CLEAN
