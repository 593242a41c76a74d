"""One generation of the stand-in: tokens as they are made, frames as they are released."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from typing import Any, Protocol

from maas.billing.v1 import ledger_pb2
from maas.common.v1 import money_pb2, usage_pb2
from maas.inference.v1 import generation_pb2
from maas.inference.v1 import generation_service_pb2 as generations

from libs.errors import MaasError
from tests.integration.tools.conformance.faults import Fault

INPUT_NANOS, OUTPUT_NANOS = 150, 600
WORDS = [f" {first}{middle}{last}" for first in "bdfgk" for middle in "aeiou" for last in "lmnrt"]


@dataclasses.dataclass(slots=True, kw_only=True)
class Key:
    project: str
    is_revoked: bool = False


@dataclasses.dataclass(slots=True)
class Worker:
    name: str
    incarnation: int = 0


class House(Protocol):
    """What a generation needs of the deployment around it."""

    fault: Fault
    step_s: float
    prefill_rate: float
    burst: int

    def usd(self, nanos: int) -> money_pb2.Money: ...
    def least_loaded(self) -> Worker: ...
    def limit_of(self, running: Running) -> int: ...
    def leave(self, running: Running) -> None: ...
    def settle(self, running: Running, cause: ledger_pb2.EndCause.ValueType) -> None: ...


class Running:
    """One generation: tokens as they are made, frames as they are released."""

    def __init__(self, house: House, identifier: str, key: Key, request: Any) -> None:
        self.house = house
        self.id = identifier
        self.key = key
        self.spec: generation_pb2.GenerationSpec = request.spec
        self.request_id: str = request.request_id
        self.is_detached = (
            isinstance(request, generations.StreamGenerateRequest)
            and request.stream.on_disconnect == generations.DISCONNECT_POLICY_CONTINUE
        )
        self.input_tokens = len(self.spec.text.split())
        self.worker: Worker | None = None
        self.log: list[generation_pb2.GenerationFrame] = []
        self.text = ""
        self.shown = 0
        self.ends: list[int] = []
        self.ids: list[int] = []
        self.released = 0
        self.end: generation_pb2.OutputEnd | None = None
        self.error: MaasError | None = None
        self.is_over = False
        self.ended_s: float | None = None
        self.readers = 0
        self.extra_nanos = 0
        self.news = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.shift = 0
        self.started_s = 0.0

    @property
    def keeps_frames(self) -> bool:
        return self.is_detached or bool(self.request_id)

    @property
    def charge(self) -> int:
        return self.input_tokens * INPUT_NANOS + self.released * OUTPUT_NANOS + self.extra_nanos

    def wake(self) -> None:
        self.news.set()
        self.news = asyncio.Event()

    def token(self, position: int) -> int:
        seed = 0 if self.house.fault is Fault.SEED_IGNORED else self.spec.sampling.seed
        source = f"{self.spec.text[:40]}|{seed}|{position + self.shift}".encode()
        return int.from_bytes(hashlib.blake2b(source, digest_size=4).digest(), "little") % len(
            WORDS
        )

    async def produce(self) -> None:
        house = self.house
        self.worker = house.least_loaded()
        await asyncio.sleep(self.input_tokens / house.prefill_rate)
        position, most = 0, house.limit_of(self)
        while position < most and self.end is None:
            if position % house.burst == 0:
                await asyncio.sleep(house.step_s)
            self._take(self.token(position))
            position += 1
            if position % house.burst:
                continue
            if not self.readers and self.keeps_frames:
                self.flush()
            self.wake()
        if self.end is None:
            is_limited = most < self.spec.stop.max_output_tokens
            limit = is_limited and house.fault is not Fault.CEILING_UNNAMED
            reason = (
                generation_pb2.FINISH_REASON_CHARGE_LIMIT
                if limit
                else generation_pb2.FINISH_REASON_MAX_TOKENS
            )
            self.end = generation_pb2.OutputEnd(reason=reason)
        self.flush()
        self.finish(ledger_pb2.END_CAUSE_COMPLETED)

    def _take(self, token: int) -> None:
        self.text += WORDS[token]
        self.ids.append(token)
        self.ends.append(len(self.text))
        for stop in self.spec.stop.stop_sequences:
            at = self.text.find(stop)
            if at >= 0:
                self.text = self.text[:at]
                while len(self.ends) > 1 and self.ends[-2] >= at:
                    self.ends.pop()
                    self.ids.pop()
                self.ends[-1] = at
                self.end = generation_pb2.OutputEnd(
                    reason=generation_pb2.FINISH_REASON_STOP_SEQUENCE, stop_sequence=stop
                )

    def _held_back(self) -> int:
        """Characters at the end that may become a stop sequence."""
        if self.house.fault is Fault.HALF_STOP or self.end is not None:
            return 0
        return max(
            (
                length
                for stop in self.spec.stop.stop_sequences
                for length in range(1, len(stop))
                if self.text.endswith(stop[:length])
            ),
            default=0,
        )

    def flush(self) -> None:
        """Releases what is ready, as one frame."""
        if not self.log:
            started = generation_pb2.Started(
                generation_id=self.id,
                input_tokens=self.input_tokens,
                seed=self.spec.sampling.seed,
            )
            self._append(started=started)
        until = len(self.text) - self._held_back()
        count = sum(end <= until for end in self.ends)
        text = self.text[self.shown : until]
        fault = self.house.fault
        if fault is Fault.HELD_FOR_EVER and self.spec.stop.stop_sequences:
            text = text.replace(self.spec.stop.stop_sequences[0][:-1], "")
        is_last = self.end is not None and self.log[-1].delta.outputs[-1:] != []
        has_end = (
            any(output.HasField("end") for frame in self.log for output in frame.delta.outputs)
            if is_last
            else False
        )
        if (text or count > self.released or self.end is not None) and not has_end:
            ids = self.ids[self.released : count]
            if not self.spec.output.return_token_ids:
                ids = []
            self.shown, self.released = until, count
            output = generation_pb2.OutputDelta(text=text, token_ids=ids, end=self.end)
            self._append(delta=generation_pb2.Delta(outputs=[output]))

    def _append(self, **event: Any) -> None:
        number = len(self.log) + 1
        if self.house.fault is Fault.SEQUENCE_GAP and number > 5:
            number += 1
        self.log.append(
            generation_pb2.GenerationFrame(sequence=number, output_tokens=self.released, **event)
        )

    def finish(self, cause: ledger_pb2.EndCause.ValueType, error: MaasError | None = None) -> None:
        """Ends it once: frame or error, record, balance."""
        if self.is_over:
            return
        self.is_over = True
        self.error = error
        if error is None and self.house.fault is not Fault.NOT_FINISHED:
            finished = generation_pb2.Finished(
                usage=self.usage(), charge=self.house.usd(self.charge)
            )
            self._append(finished=finished)
        self.ended_s = asyncio.get_running_loop().time()
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()
        self.house.leave(self)
        self.house.settle(self, cause)
        self.wake()

    def usage(self) -> usage_pb2.TokenUsage:
        return usage_pb2.TokenUsage(input_tokens=self.input_tokens, output_tokens=self.released)
