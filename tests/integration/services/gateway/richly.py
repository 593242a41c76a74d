"""Requests for more than the text of one output, and what workers say to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2, scores_pb2, tools_pb2
from typing_extensions import override

from tests.integration.services.gateway.client import Reading, Wish
from tests.integration.services.gateway.harness import Worker

Spec = generation_pb2.GenerationSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Rich(Wish):
    """A wish whose spec is changed before it is sent.

    Attributes:
        change: changes it.
    """

    change: Callable[[Spec], object] = lambda _: None

    @override
    def spec(self) -> Spec:
        """Makes the spec."""
        spec = Wish.spec(self)
        self.change(spec)
        return spec


def several(count: int) -> Callable[[Spec], object]:
    """Asks for several outputs."""

    def change(spec: Spec) -> None:
        spec.output.count = count

    return change


def scored(spec: Spec) -> None:
    """Asks for log-probabilities."""
    spec.output.return_logprobs = True


def chat(spec: Spec) -> None:
    """Asks in a conversation, with a tool."""
    message = spec.chat.messages.add(role=generation_pb2.ROLE_USER)
    message.parts.add(text="hello")
    spec.tools.tools.add(name="f")


def thoughtless(spec: Spec) -> None:
    """Asks in a conversation, without the reasoning."""
    chat(spec)
    spec.output.return_reasoning = False


def constrained(spec: Spec) -> None:
    """Asks for a JSON object."""
    spec.constraint.json_object.SetInParent()


def lanes_of(execution: engine_pb2.Execution) -> list[int]:
    """Returns the lanes of all outputs."""
    return [execution.lane, *execution.more_lanes]


def scores_of(*token_ids: int) -> scores_pb2.TokenScores:
    """Makes scores of tokens."""
    return scores_pb2.TokenScores(token_ids=token_ids, logprobs=[-float(n) for n in token_ids])


def tell(
    worker: Worker,
    lane: int,
    *segments: engine_pb2.Segment,
    token_ids: Sequence[int] = (1,),
    reasoning_tokens: int = 0,
    scores: scores_pb2.TokenScores | None = None,
) -> None:
    """Sends one step of one row that shows more than text."""
    events = engine_pb2.StepEvents(
        lanes=[lane],
        token_ids=token_ids,
        token_counts=[len(token_ids)],
        texts=[""],
        segments=[
            engine_pb2.RowSegments(row=0, segments=segments, reasoning_tokens=reasoning_tokens)
        ],
    )
    if scores is not None:
        events.scores.add(row=0, scores=scores)
    worker.responses.put_nowait(events)


def score(worker: Worker, lane: int, text: str, *token_ids: int) -> None:
    """Sends one step of one row of text with its scores."""
    events = engine_pb2.StepEvents(
        lanes=[lane], token_ids=token_ids, token_counts=[len(token_ids)], texts=[text]
    )
    events.scores.add(row=0, scores=scores_of(*token_ids))
    worker.responses.put_nowait(events)


def prefill(worker: Worker, lane: int, cached_tokens: int) -> None:
    """Says that the prefix cache had a part of the prompt."""
    prefilled = engine_pb2.Prefilled(lane=lane, cached_tokens=cached_tokens)
    worker.responses.put_nowait(engine_pb2.StepEvents(prefilled=[prefilled]))


def score_prompt(worker: Worker, lane: int, offset: int, *token_ids: int) -> None:
    """Sends scores of a part of the prompt."""
    part = scores_pb2.PromptScores(offset=offset, scores=scores_of(*token_ids))
    events = engine_pb2.StepEvents(
        prompt_scores=[engine_pb2.LanePromptScores(lane=lane, scores=part)]
    )
    worker.responses.put_nowait(events)


def thought(text: str) -> engine_pb2.Segment:
    """Makes reasoning."""
    return engine_pb2.Segment(reasoning=text)


def said(text: str) -> engine_pb2.Segment:
    """Makes text of the answer."""
    return engine_pb2.Segment(text=text)


def called(arguments: str, *, index: int = 0, id_: str = "", name: str = "") -> engine_pb2.Segment:
    """Makes a part of a call."""
    call = tools_pb2.ToolCallDelta(call_index=index, id=id_, name=name, arguments_json=arguments)
    return engine_pb2.Segment(tool_call=call)


def deltas_of(stream: Reading, index: int = 0) -> list[generation_pb2.OutputDelta]:
    """Returns what came of one output."""
    return [
        output for frame in stream.frames for output in frame.delta.outputs if output.index == index
    ]


def text_of(stream: Reading, index: int = 0) -> str:
    """Returns all text of one output."""
    return "".join(delta.text for delta in deltas_of(stream, index))
