"""Clients of the simulation: what they ask for, what they get, and when they leave."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

from maas.inference.v1 import generation_pb2, generation_service_pb2

from libs.auth import Principal
from libs.errors import Cancelled, MaasError, unavailable
from libs.rpc import Call
from libs.rpc.call import set_current_call
from libs.rpc.policy import policies_of
from services.gateway.service import GenerationService
from tests.sim.money_loop import Loop, Process, State
from tests.sim.money_network import OUTSIDE, Prompt

_SERVICE = generation_service_pb2.DESCRIPTOR.services_by_name["GenerationService"]
POLICIES = policies_of(_SERVICE)


@dataclass(slots=True)
class Ask:
    """One call and what its client knows of it.

    Attributes:
        gateway: instance that was called.
        at_s: when.
        prompt: what is asked for.
        max_output_tokens: at most.
        is_unary: one answer instead of a stream.
        request_id: idempotency key, if any.
        lives_on: it is to go on without its client.
        reads_s: mean seconds that the client takes for a frame.
        generation_id: once it was told.
        tokens: received.
        finished: the last frame, or the answer.
        error: what it ended with instead.
        left_at_s: when the client went away.
        met_halt: its gateway was halted while it ran.
        is_repeat: another call came before with this request_id.
        defects: what was wrong with its frames.
    """

    gateway: str
    principal: Principal
    at_s: float
    prompt: Prompt
    max_output_tokens: int
    is_unary: bool = False
    request_id: str = ""
    lives_on: bool = False
    reads_s: float = 0.0
    generation_id: str = ""
    tokens: int = 0
    input_tokens: int = 0
    finished: generation_pb2.Finished | generation_pb2.Generation | None = None
    error: MaasError | None = None
    left_at_s: float | None = None
    met_halt: bool = False
    is_repeat: bool = False
    defects: list[str] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether the client waits for nothing more."""
        return self.finished is not None or self.error is not None or self.left_at_s is not None


class SimCall:
    """The call's two ends: the gateway's context to write to, and the client that reads."""

    def __init__(self, ask: Ask, loop: Loop, rng: random.Random, process: Process) -> None:
        self.ask = ask
        self._loop = loop
        self._rng = rng
        self._process = process
        self._task: asyncio.Task[None] | None = None

    def start(self, service: GenerationService) -> None:
        """Calls the gateway."""
        self._task = self._process.start(self._serve(service))

    def leave(self) -> None:
        """The client goes away; the gateway hears of it a moment later."""
        if self.ask.is_over:
            return
        self.ask.left_at_s = self._loop.time()
        self._later(self.hang_up)

    def break_off(self) -> None:
        """The gateway is dead: what was on its way may still come, then the connection breaks."""
        if not self.ask.is_over:
            self._later(self._fail, unavailable("gateway"))

    def is_of(self, process: Process) -> bool:
        """Tells whether a process serves it."""
        return self._process is process

    async def write(self, message: bytes) -> None:
        """Hands a frame to the transport, which takes the next one when this one was read."""
        if self.ask.left_at_s is not None:
            raise asyncio.CancelledError
        taken: asyncio.Future[None] = self._loop.create_future()
        delay_s = self._rng.expovariate(300.0)
        if self.ask.reads_s:
            delay_s += self._rng.uniform(0.0, 2 * self.ask.reads_s)
        self._loop.call_later(delay_s, self._receive, message, taken, context=OUTSIDE)
        await taken

    async def _serve(self, service: GenerationService) -> None:
        ask = self.ask
        policy = POLICIES["Generate" if ask.is_unary else "StreamGenerate"]
        now_s = self._loop.time()
        set_current_call(
            Call(
                policy=policy,
                request_id="",
                started_s=now_s,
                deadline_s=None if policy.default_deadline_s is None else now_s + 600.0,
                principal=ask.principal,
            )
        )
        spec = generation_pb2.GenerationSpec(model="m", text=ask.prompt.text)
        spec.stop.max_output_tokens = ask.max_output_tokens
        spec.output.return_token_ids = True
        try:
            if ask.is_unary:
                answer = await service.Generate(
                    generation_service_pb2.GenerateRequest(
                        spec=spec,
                        request_id=ask.request_id,
                        on_disconnect=_policy(ask),
                    ),
                    self,  # type: ignore[arg-type]  # what is used of a context
                )
                self._later(self._answer, answer.generation)
            else:
                request = generation_service_pb2.StreamGenerateRequest(
                    spec=spec, request_id=ask.request_id
                )
                request.stream.on_disconnect = _policy(ask)
                await service.StreamGenerate(
                    request,
                    self,  # type: ignore[arg-type]  # what is used of a context
                )
        except MaasError as error:
            self._later(self._fail, error)

    def hang_up(self) -> None:
        """The server cancels the handler."""
        if self._task is not None and self._process.state is not State.DEAD:
            self._task.cancel()

    def _receive(self, message: bytes, taken: asyncio.Future[None]) -> None:
        ask = self.ask
        if ask.left_at_s is None and ask.error is None:
            self._read(generation_service_pb2.StreamGenerateResponse.FromString(message).frame)
            if not taken.done():
                taken.set_result(None)
        elif not taken.done():
            taken.set_exception(Cancelled("gone"))

    def _read(self, frame: generation_pb2.GenerationFrame) -> None:
        ask = self.ask
        if frame.HasField("started"):
            ask.generation_id = frame.started.generation_id
            ask.input_tokens = frame.started.input_tokens
        elif frame.HasField("finished"):
            ask.finished = frame.finished
        else:
            self._count([token for item in frame.delta.outputs for token in item.token_ids])

    def _answer(self, generation: generation_pb2.Generation) -> None:
        ask = self.ask
        if ask.is_over:
            return
        ask.generation_id = generation.generation_id
        ask.input_tokens = generation.usage.input_tokens
        self._count(list(generation.outputs[0].token_ids))
        ask.finished = generation

    def _count(self, tokens: list[int]) -> None:
        """A worker counts from 1: whatever is missing, doubled or out of order is seen."""
        ask = self.ask
        want = list(range(ask.tokens + 1, ask.tokens + 1 + len(tokens)))
        if tokens != want:
            ask.defects.append(f"behind {ask.tokens} came {tokens}")
        ask.tokens += len(tokens)

    def _fail(self, error: MaasError) -> None:
        if not self.ask.is_over:
            self.ask.error = error

    def _later(self, callback: object, *args: object) -> None:
        assert callable(callback)
        self._loop.call_later(self._rng.expovariate(200.0), callback, *args, context=OUTSIDE)


def _policy(ask: Ask) -> generation_service_pb2.DisconnectPolicy.ValueType:
    if ask.lives_on:
        return generation_service_pb2.DISCONNECT_POLICY_CONTINUE
    return generation_service_pb2.DISCONNECT_POLICY_UNSPECIFIED
