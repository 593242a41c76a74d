"""A deployment in one process, in miniature, which can be wrong in one way: what the kit must see.

Real gRPC, no engine: the token at a position follows from prompt, seed and position.
"""

# ruff: noqa: N802 - the names of rpcs

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from maas.auth.v1 import api_key_service_pb2 as api_keys
from maas.auth.v1 import tenancy_pb2
from maas.auth.v1 import tenancy_service_pb2 as tenancy
from maas.billing.v1 import account_service_pb2 as accounts
from maas.billing.v1 import ledger_pb2
from maas.billing.v1 import usage_service_pb2 as usage
from maas.common.v1 import money_pb2
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2
from maas.inference.v1 import generation_service_pb2 as generations
from maas.scheduler.v1 import worker_pb2
from maas.scheduler.v1 import worker_service_pb2 as workers

from libs.clock import SystemClock
from libs.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    FieldRule,
    InvalidArgument,
    MaasError,
    NotFound,
    OutOfRange,
    PermissionDenied,
    Reason,
    Unauthenticated,
    Unavailable,
    Violation,
    invalid_field,
)
from tests.integration.tools.conformance.faults import Fault
from tests.integration.tools.conformance.running import (
    INPUT_NANOS,
    OUTPUT_NANOS,
    Key,
    Running,
    Worker,
)
from tests.integration.tools.conformance.serving import refuse, refusing
from tools.conformance.deployment import Deployment

CONTEXT = 8000
STALL_LIMIT_S = 0.5
REPLAY_WINDOW_S = 0.6


class StandIn:
    """All services, on one port, with one fault at most."""

    def __init__(
        self,
        fault: Fault = Fault.NONE,
        *,
        step_s: float = 0.001,
        capacity: int = 100,
        prefill_rate: float = 1e6,
        burst: int = 1,
    ) -> None:
        self.fault = fault
        self.step_s = step_s
        self.capacity = capacity
        self.prefill_rate = prefill_rate
        self.burst = burst
        self.keys = {"own": Key(project="projects/own")}
        self.workers = [Worker("workers/w1"), Worker("workers/w2")]
        self.generations: dict[str, Running] = {}
        self.by_request: dict[tuple[str, str], Running] = {}
        self.records: dict[str, list[ledger_pb2.UsageRecord]] = {}
        self.posted = 10**12
        self.places = asyncio.Semaphore(2 * capacity)
        self._placed: set[str] = set()

    def usd(self, nanos: int) -> money_pb2.Money:
        return money_pb2.Money(currency_code="USD", nanos=nanos)

    # ---- placement

    def busy(self, worker: Worker) -> int:
        return sum(item.worker is worker and not item.is_over for item in self.generations.values())

    def least_loaded(self) -> Worker:
        return min(self.workers, key=self.busy)

    def leave(self, running: Running) -> None:
        if running.id not in self._placed:
            return
        self._placed.discard(running.id)
        delay_s = 0.6 if self.fault is Fault.PLACE_KEPT else 0.0
        asyncio.get_running_loop().call_later(delay_s, self.places.release)

    def limit_of(self, running: Running) -> int:
        most = running.spec.stop.max_output_tokens
        if not running.spec.HasField("max_charge"):
            return most
        left = running.spec.max_charge.nanos - running.input_tokens * INPUT_NANOS
        paid = left // OUTPUT_NANOS
        paid += {Fault.CEILING_OVERRUN: 1, Fault.CEILING_EARLY: -1}.get(self.fault, 0)
        return min(most, max(paid, 1))

    async def kill(self, name: str) -> None:
        worker = next(item for item in self.workers if item.name == name)
        await self._lose(worker, is_visible=self.fault is Fault.DEATH_SHOWS)

    async def drain(self, name: str) -> None:
        worker = next(item for item in self.workers if item.name == name)
        await self._lose(worker, is_visible=self.fault is Fault.DRAIN_SHOWS)

    async def _lose(self, worker: Worker, *, is_visible: bool) -> None:
        worker.incarnation += 1
        for running in self.generations.values():
            if running.worker is not worker or running.is_over:
                continue
            if is_visible:
                error = Unavailable("the worker was lost", reason=Reason.WORKER_LOST)
                running.finish(ledger_pb2.END_CAUSE_WORKER_LOST, error)
            running.worker = next(item for item in self.workers if item is not worker)
            running.shift = {Fault.DEATH_CHANGES: 100_000, Fault.DEATH_REPEATS: -1}.get(
                self.fault, 0
            )

    # ---- money

    def settle(self, running: Running, cause: ledger_pb2.EndCause.ValueType) -> None:
        if not running.released and cause != ledger_pb2.END_CAUSE_COMPLETED and not running.log:
            return
        if self.fault is Fault.CAUSE_WRONG:
            cause = ledger_pb2.END_CAUSE_COMPLETED
        is_ours = cause >= ledger_pb2.END_CAUSE_WORKER_LOST
        charge = 0 if is_ours else running.charge
        self.posted -= charge
        now = SystemClock().now()
        record = ledger_pb2.UsageRecord(
            generation_id=running.id,
            usage=running.usage(),
            charge=self.usd(charge),
            end_cause=cause,
            request_id=running.request_id,
        )
        record.end_time.FromDatetime(now)
        life_s = asyncio.get_running_loop().time() - running.started_s
        record.start_time.FromNanoseconds(record.end_time.ToNanoseconds() - int(life_s * 1e9))
        copies = 2 if self.fault is Fault.RECORDED_TWICE else 1
        self.records.setdefault(running.id, []).extend([record] * copies)

    async def GetBalance(self, _request: Any, _context: Any) -> accounts.GetBalanceResponse:
        balance = ledger_pb2.Balance(posted=self.usd(self.posted), held=self.usd(0))
        return accounts.GetBalanceResponse(account="accounts/own", balance=balance)

    async def ListUsageRecords(
        self, request: usage.ListUsageRecordsRequest, _context: Any
    ) -> usage.ListUsageRecordsResponse:
        return usage.ListUsageRecordsResponse(
            usage_records=self.records.get(request.generation_id, [])
        )

    # ---- keys and workers

    async def GetCallerInfo(self, _request: Any, context: Any) -> api_keys.GetCallerInfoResponse:
        key = await self._key(context)
        return api_keys.GetCallerInfoResponse(
            api_key=tenancy_pb2.ApiKey(project=key.project), organization="organizations/own"
        )

    async def CreateProject(self, _request: Any, _context: Any) -> tenancy.CreateProjectResponse:
        return tenancy.CreateProjectResponse()

    async def CreateApiKey(
        self, request: api_keys.CreateApiKeyRequest, _context: Any
    ) -> api_keys.CreateApiKeyResponse:
        secret = f"key{len(self.keys)}"
        self.keys[secret] = Key(project=request.project)
        made = tenancy_pb2.ApiKey(name=f"apiKeys/{secret}", project=request.project)
        return api_keys.CreateApiKeyResponse(api_key=made, secret=secret)

    async def RevokeApiKey(
        self, request: api_keys.RevokeApiKeyRequest, _context: Any
    ) -> api_keys.RevokeApiKeyResponse:
        key = self.keys[request.name.removeprefix("apiKeys/")]
        key.is_revoked = True
        if self.fault is not Fault.REVOKED_GO_ON:
            is_wrong = self.fault is Fault.REVOKED_AS_ABORTED
            for running in self.generations.values():
                if running.key is key:
                    error: MaasError = Unauthenticated("revoked", reason=Reason.CREDENTIALS_REVOKED)
                    if is_wrong:
                        error = Aborted("cancelled")
                    running.finish(ledger_pb2.END_CAUSE_REVOKED, error)
        return api_keys.RevokeApiKeyResponse()

    async def ListWorkers(self, _request: Any, _context: Any) -> workers.ListWorkersResponse:
        return workers.ListWorkersResponse(
            workers=[
                worker_pb2.Worker(
                    name=worker.name,
                    incarnation=f"{worker.name}.{worker.incarnation}",
                    state=worker_pb2.WORKER_STATE_READY,
                    info=engine_pb2.EngineInfo(max_running=self.capacity, context_length=CONTEXT),
                    load=engine_pb2.LoadReport(running=self.busy(worker)),
                )
                for worker in self.workers
            ]
        )

    # ---- the token API

    async def _key(self, context: Any) -> Key:
        metadata = dict(context.invocation_metadata())
        secret = str(metadata["authorization"]).removeprefix("Bearer ")
        key = self.keys.get(secret)
        if key is None:
            await refuse(context, Unauthenticated("unknown"))
        assert key is not None
        return key

    def _check(self, request: Any) -> None:
        spec: generation_pb2.GenerationSpec = request.spec
        if len(spec.text.split()) > CONTEXT:
            if self.fault is Fault.REFUSAL_COSTS:
                self.posted -= 1
            raise InvalidArgument(
                "too long",
                reason=Reason.CONTEXT_LENGTH_EXCEEDED,
                violations=[Violation("spec.text", FieldRule.TOO_LONG, "too long")],
            )
        least = len(spec.text.split()) * INPUT_NANOS + OUTPUT_NANOS
        if (
            spec.HasField("max_charge")
            and spec.max_charge.nanos < least
            and self.fault is not Fault.CEILING_ACCEPTED
        ):
            raise invalid_field("spec.max_charge", FieldRule.OUT_OF_RANGE, "too low")
        interval_ns = getattr(request, "stream", generations.StreamOptions()).frame_interval
        is_odd = not 0 <= interval_ns.ToNanoseconds() <= 10**9
        if is_odd and self.fault is not Fault.INTERVAL_UNCHECKED:
            raise invalid_field("stream.frame_interval", FieldRule.OUT_OF_RANGE, "odd")

    def _is_kept(self, running: Running) -> bool:
        if running.ended_s is None or self.fault is Fault.RESUME_LATE:
            return True
        return asyncio.get_running_loop().time() - running.ended_s < REPLAY_WINDOW_S

    def _join(self, request: Any, key: Key) -> Running | None:
        """The generation that a request repeats."""
        project = "" if self.fault is Fault.PROJECTS_SHARE else key.project
        found = self.by_request.get((project, request.request_id))
        if not request.request_id or found is None or self.fault is Fault.REPEAT_RUNS_ANEW:
            return None
        if found.spec != request.spec and self.fault is not Fault.OTHER_BODY_JOINS:
            raise InvalidArgument("other body", reason=Reason.REQUEST_ID_REUSED)
        if not self._is_kept(found):
            if self.fault is Fault.SETTLED_FORGOTTEN:
                return None
            raise AlreadyExists(
                "settled",
                reason=Reason.GENERATION_SETTLED,
                metadata={
                    "requestId": request.request_id,
                    "generationId": found.id,
                    "inputTokens": str(found.input_tokens),
                    "outputTokens": str(found.released),
                    "chargeNanos": str(found.charge),
                    "currency": "USD",
                },
            )
        if self.fault is Fault.REPEAT_COSTS:
            self.posted -= found.charge
        return found

    async def _begin(self, request: Any, context: Any) -> tuple[Running, bool]:
        """Starts or joins; whether it joined."""
        key = await self._key(context)
        self._check(request)
        found = self._join(request, key)
        if found is not None:
            return found, True
        running = Running(self, f"gen_{len(self.generations)}", key, request)
        running.started_s = asyncio.get_running_loop().time()
        self.generations[running.id] = running
        project = "" if self.fault is Fault.PROJECTS_SHARE else key.project
        self.by_request[project, request.request_id] = running
        try:
            await self.places.acquire()
        except asyncio.CancelledError:
            running.is_over = True
            raise
        self._placed.add(running.id)
        running.task = asyncio.create_task(running.produce())
        return running, False

    async def StreamGenerate(
        self, request: generations.StreamGenerateRequest, context: Any
    ) -> None:
        async with refusing(context):
            running, is_repeat = await self._begin(request, context)
            interval_s = request.stream.frame_interval.ToNanoseconds() / 1e9
            try:
                await self._feed(
                    running,
                    context,
                    generations.StreamGenerateResponse,
                    interval_s=interval_s,
                    is_repeat=is_repeat,
                )
            except asyncio.CancelledError:
                if (not is_repeat and not running.keeps_frames) or (
                    self.fault is Fault.DROP_CANCELS and running.is_detached
                ):
                    running.finish(_cause_of_cancel(context), Aborted("left alone"))
                raise

    async def ResumeGeneration(
        self, request: generations.ResumeGenerationRequest, context: Any
    ) -> None:
        async with refusing(context):
            key = await self._key(context)
            running = self.generations.get(request.generation_id)
            if running is None:
                raise NotFound("unknown", reason=Reason.GENERATION_NOT_FOUND)
            if running.key.project != key.project and self.fault is not Fault.RESUME_FOR_ALL:
                raise PermissionDenied("other project")
            if not running.keeps_frames and self.fault is not Fault.RESUME_PLAIN:
                raise FailedPrecondition("plain", reason=Reason.NOT_RESUMABLE)
            if not self._is_kept(running):
                raise OutOfRange("expired")
            if self.fault is Fault.DROP_COSTS:
                running.extra_nanos = running.input_tokens * INPUT_NANOS
            position = request.after_sequence
            if position:
                position += {Fault.RESUME_REPEATS: -1, Fault.RESUME_SKIPS: 1}.get(self.fault, 0)
            response = generations.ResumeGenerationResponse
            await self._feed(running, context, response, position=position)

    async def _feed(
        self,
        running: Running,
        context: Any,
        response: Callable[..., Any],
        *,
        interval_s: float = 0.0,
        is_repeat: bool = False,
        position: int = 0,
    ) -> None:
        running.readers += 1
        try:
            while True:
                news = running.news
                if not running.is_over:
                    running.flush()
                for frame in running.log[position:]:
                    sent = frame
                    if is_repeat and frame.HasField("started"):
                        sent = generation_pb2.GenerationFrame()
                        sent.CopyFrom(frame)
                        sent.started.replayed = self.fault is not Fault.REPEAT_UNSAID
                    await self._write(running, context, response(frame=sent))
                    position += 1
                if running.is_over and position >= len(running.log):
                    if running.error is not None:
                        raise running.error
                    return
                if interval_s and position > 1 and self.fault is not Fault.INTERVAL_IGNORED:
                    await asyncio.sleep(interval_s)
                else:
                    await news.wait()
        finally:
            running.readers -= 1

    async def _write(self, running: Running, context: Any, response: Any) -> None:
        limit_s = {Fault.STALL_UNSEEN: 30.0, Fault.STALL_EARLY: 0.1}.get(self.fault, STALL_LIMIT_S)
        try:
            async with asyncio.timeout(limit_s):
                await context.write(response)
        except TimeoutError:
            error = Aborted("stalled", reason=Reason.CONSUMER_STALLED)
            if not running.is_detached:
                running.finish(ledger_pb2.END_CAUSE_STALLED, error)
            raise error from None

    async def Generate(
        self, request: generations.GenerateRequest, context: Any
    ) -> generations.GenerateResponse:
        async with refusing(context):
            running, _ = await self._begin(request, context)
            if self.fault is Fault.UNARY_DEARER:
                running.extra_nanos = 1
            running.readers += 1
            while not running.is_over:
                await running.news.wait()
            deltas = [output for frame in running.log for output in frame.delta.outputs]
            output = generation_pb2.Output(
                text="".join(item.text for item in deltas),
                token_ids=[token for item in deltas for token in item.token_ids],
                end=running.end,
            )
            return generations.GenerateResponse(
                generation=generation_pb2.Generation(
                    generation_id=running.id,
                    outputs=[output],
                    usage=running.usage(),
                    charge=self.usd(running.charge),
                )
            )
        raise AssertionError("refused")

    async def CancelGeneration(
        self, request: generations.CancelGenerationRequest, context: Any
    ) -> generations.CancelGenerationResponse:
        async with refusing(context):
            key = await self._key(context)
            running = self.generations.get(request.generation_id)
            if running is None or running.key.project != key.project:
                raise NotFound("unknown", reason=Reason.GENERATION_NOT_FOUND)
            if running.is_over and self.fault is Fault.CANCEL_ONCE:
                raise NotFound("over", reason=Reason.GENERATION_NOT_FOUND)
            running.finish(ledger_pb2.END_CAUSE_CLIENT_CANCELLED, Aborted("cancelled"))
        return generations.CancelGenerationResponse()

    def deployment(self, endpoint: str) -> Deployment:
        """How the kit reaches it."""
        return Deployment(
            endpoint=endpoint,
            api_key="own",
            model="model",
            admin_key="own",
            auth=endpoint,
            billing=endpoint,
            scheduler=endpoint,
            stall_limit_s=STALL_LIMIT_S,
            replay_window_s=REPLAY_WINDOW_S,
            kill=self.kill,
            drain=self.drain,
        )


def _cause_of_cancel(context: Any) -> ledger_pb2.EndCause.ValueType:
    left_s = context.time_remaining()
    is_late = left_s is not None and left_s < 0.05
    return ledger_pb2.END_CAUSE_DEADLINE if is_late else ledger_pb2.END_CAUSE_CLIENT_CANCELLED
