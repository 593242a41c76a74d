"""What is remembered of the running executions of the trtllm engine. Belongs to the event loop."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.worker.engine.base import Ended, EngineRequest, Lane, Prefilled
from services.worker.engine.trtllm_api import RequestOutput
from services.worker.engine.trtllm_output import Bounds, Output
from services.worker.engine.trtllm_scores import ScoreColumns
from services.worker.engine.wire import Report, column


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneLimits:
    """What the lanes of an engine have in common.

    Attributes:
        capacity: of them in the engine's batch.
        context_length: prompt and output together, tokens.
        end_ids: that end an output of the model.
        interval: steps between two frames. TensorRT-LLM has an interval, too, but of its engine,
            which is fixed when it is loaded.
        interval_under_load: the same when most places are taken.
    """

    capacity: int
    context_length: int
    end_ids: frozenset[int]
    interval: int = 1
    interval_under_load: int = 1


@dataclass(slots=True)
class Running:
    """One execution.

    Attributes:
        request: of it.
        bounds: where it ends.
        output: what it has said.
        result: of the engine; None while the engine has not got it.
        is_held: it waits here until nothing else does.
        has_begun: its first token has come.
        is_aborted: nobody wants more of it.
        is_stopping: the engine was told to stop.
    """

    request: EngineRequest
    bounds: Bounds
    output: Output
    result: RequestOutput | None = None
    is_held: bool = False
    has_begun: bool = False
    is_aborted: bool = False
    is_stopping: bool = False


@dataclass(slots=True)
class Pending:
    """What the next frame says."""

    lanes: list[Lane] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prefilled: list[Prefilled] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    scores: ScoreColumns = field(default_factory=ScoreColumns)

    def report(self) -> Report:
        """All of it, in columns."""
        return Report(
            lanes=column("q", self.lanes),
            token_ids=column("i", self.token_ids),
            prefilled=self.prefilled,
            ended=self.ended,
            scores=[self.scores.block()] if self.scores.rows else [],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How many lanes there are, and how much they hold.

    Attributes:
        running: that have begun.
        waiting: that have not.
        waiting_tokens: of the prompts of these.
        held_tokens: prompt and output of those that have begun.
    """

    running: int
    waiting: int
    waiting_tokens: int
    held_tokens: int


def prompt_tokens(request: EngineRequest) -> int:
    """Tokens that are computed before the first one is drawn."""
    return len(request.prompt_ids) + len(request.continue_ids)
