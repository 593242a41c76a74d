"""The grammar of a token stream, checked frame by frame. Pure: no gRPC, no clock.

started prompt_scores* delta* finished   1, 2, 3, ... without a gap, over any number of calls;
                                         every output has one end, and nothing behind it
"""

from __future__ import annotations

from dataclasses import dataclass, field

from maas.inference.v1 import generation_pb2, scores_pb2, tools_pb2

from tools.conformance.verdict import Mismatch, expect

FRAME_BYTES_MAX = 256 * 1024


@dataclass(slots=True)
class Outcome:
    """What a reader has of one output.

    Attributes:
        text: of the answer.
        reasoning: its text.
        calls: of tools, in order.
        token_ids: so far; empty unless they were asked for.
        scores: of its tokens, by column.
        end: how it ended; None before that.
    """

    text: str = ""
    reasoning: str = ""
    calls: list[tools_pb2.ToolCall] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    scores: scores_pb2.TokenScores = field(default_factory=scores_pb2.TokenScores)
    end: generation_pb2.OutputEnd | None = None

    def add(self, delta: generation_pb2.OutputDelta) -> bool:
        """Takes new output; returns whether there was any to see.

        Raises:
            Mismatch: it may not come here.
        """
        expect(self.end is None, f"output {delta.index} goes on after its end")
        self.text += delta.text
        self.reasoning += delta.reasoning
        if delta.HasField("tool_call"):
            self._add_call(delta.tool_call)
        self.token_ids += delta.token_ids
        self.scores.MergeFrom(delta.scores)
        if delta.HasField("scores"):
            # The number of alternatives is no column.
            self.scores.top_count = delta.scores.top_count
            is_same = not delta.token_ids or delta.scores.token_ids == delta.token_ids
            expect(is_same, f"output {delta.index} has scores of other tokens than its own")
        if delta.HasField("end"):
            self.end = delta.end
        return bool(delta.text or delta.reasoning or delta.HasField("tool_call"))

    def _add_call(self, part: tools_pb2.ToolCallDelta) -> None:
        is_first = part.call_index == len(self.calls)
        if is_first:
            expect(bool(part.id and part.name), "the first part of a tool call has no id or name")
            self.calls.append(tools_pb2.ToolCall(id=part.id, name=part.name))
        expect(part.call_index == len(self.calls) - 1, "parts of tool calls are out of order")
        is_plain = is_first or not part.id + part.name
        expect(is_plain, "a later part of a tool call has an id or a name")
        self.calls[-1].arguments_json += part.arguments_json


class Transcript:
    """What a reader has of one generation.

    Attributes:
        started: the first frame's content; None before it.
        finished: the last frame's content; None before it.
        outputs: by number.
        prompt_scores: of all tokens of the prompt so far, by column.
        sequence: number of the last frame; 0 before the first.
        output_tokens: count of the last frame.
        frames: how many came.
        deltas: how many of them were deltas.
    """

    def __init__(self, *, with_token_ids: bool, may_merge: bool = False, outputs: int = 1) -> None:
        """Begins with nothing.

        Args:
            with_token_ids: the request asked for them; then every count has to be theirs.
            may_merge: the frames are replayed: several deltas may come as one.
            outputs: how many the request asked for.
        """
        self._with_token_ids = with_token_ids
        self._may_merge = may_merge
        self.started: generation_pb2.Started | None = None
        self.finished: generation_pb2.Finished | None = None
        self.outputs = {index: Outcome() for index in range(outputs)}
        self.prompt_scores = scores_pb2.TokenScores()
        self.sequence = 0
        self.output_tokens = 0
        self.frames = 0
        self.deltas = 0

    @property
    def first(self) -> Outcome:
        """Output 0: the only one, unless more were asked for."""
        return self.outputs[0]

    @property
    def text(self) -> str:
        """All text of output 0 so far."""
        return self.first.text

    @property
    def token_ids(self) -> list[int]:
        """All token ids of output 0 so far; empty unless they were asked for."""
        return self.first.token_ids

    @property
    def end(self) -> generation_pb2.OutputEnd | None:
        """How output 0 ended; None before that."""
        return self.first.end

    @property
    def generation_id(self) -> str:
        """From the first frame.

        Raises:
            Mismatch: it has not come.
        """
        if self.started is None:
            raise Mismatch("expected a started frame first, got none")
        return self.started.generation_id

    def resume(self) -> None:
        """The next frames come from another call, which may merge what was missed."""
        self._may_merge = True

    def add(self, frame: generation_pb2.GenerationFrame) -> None:
        """Takes a frame.

        Raises:
            Mismatch: it may not come here, or contradicts what came before.
        """
        expect(self.finished is None, f"frame {frame.sequence} came after finished")
        size = frame.ByteSize()
        expect(size <= FRAME_BYTES_MAX, f"frame {frame.sequence} has {size} bytes")
        self._check_number(frame)
        expect(
            frame.output_tokens >= self.output_tokens,
            f"output_tokens fell from {self.output_tokens} to {frame.output_tokens}",
        )
        kind = frame.WhichOneof("event")
        match kind:
            case "started":
                self._add_started(frame)
            case "delta":
                self._add_delta(frame)
            case "finished":
                self._add_finished(frame)
            case "prompt_scores":
                self._add_prompt_scores(frame)
            case _:
                raise Mismatch(f"frame {frame.sequence} says nothing")
        self.sequence = frame.sequence
        self.output_tokens = frame.output_tokens
        self.frames += 1

    def complete(self) -> None:
        """The call ended with OK.

        Raises:
            Mismatch: finished is missing, so the stream was cut on its way.
        """
        expect(
            self.finished is not None,
            f"the call ended OK after frame {self.sequence} without finished",
        )

    def _check_number(self, frame: generation_pb2.GenerationFrame) -> None:
        wanted = self.sequence + 1
        first = frame.first_sequence or frame.sequence
        expect(first == wanted, f"expected frame {wanted}, got {first}")
        if not frame.first_sequence:
            return
        expect(self._may_merge, f"frame {frame.sequence} is merged, though nothing is replayed")
        expect(
            frame.WhichOneof("event") == "delta" and frame.sequence > frame.first_sequence,
            f"frame {frame.sequence} has first_sequence {frame.first_sequence} and merges nothing",
        )

    def _add_started(self, frame: generation_pb2.GenerationFrame) -> None:
        expect(self.started is None, f"frame {frame.sequence} is a second started")
        expect(frame.output_tokens == 0, f"started counts {frame.output_tokens} output tokens")
        expect(bool(frame.started.generation_id), "started has no generation_id")
        expect(frame.started.input_tokens > 0, "started has no input_tokens")
        self.started = frame.started

    def _add_prompt_scores(self, frame: generation_pb2.GenerationFrame) -> None:
        number = frame.sequence
        expect(self.started is not None, f"prompt_scores {number} came before started")
        expect(not self.deltas, f"prompt_scores {number} came after output")
        part, known = frame.prompt_scores, len(self.prompt_scores.token_ids)
        expect(part.offset == known, f"prompt_scores {number} begins at {part.offset}, not {known}")
        expect(bool(part.scores.token_ids), f"prompt_scores {number} says nothing")
        self.prompt_scores.MergeFrom(part.scores)
        self.prompt_scores.top_count = part.scores.top_count

    def _add_delta(self, frame: generation_pb2.GenerationFrame) -> None:
        number = frame.sequence
        expect(self.started is not None, f"delta {number} came before started")
        outputs = frame.delta.outputs
        expect(len(outputs) > 0, f"delta {number} has no outputs")
        news = frame.output_tokens - self.output_tokens
        has_news = news > 0
        ids = 0
        for output in outputs:
            expect(output.index in self.outputs, f"delta {number} is of output {output.index}")
            has_news |= self.outputs[output.index].add(output)
            has_news |= output.HasField("end")
            ids += len(output.token_ids)
        expect(has_news, f"delta {number} says nothing new")
        if self._with_token_ids:
            expect(ids == news, f"delta {number} counts {news} tokens and has {ids} ids")
        else:
            expect(not ids, f"delta {number} has token ids that nobody asked for")
        self.deltas += 1

    def _add_finished(self, frame: generation_pb2.GenerationFrame) -> None:
        expect(self.started is not None, "finished came before started")
        is_over = all(output.end is not None for output in self.outputs.values())
        expect(is_over, "finished came before the end of the output")
        expect(
            frame.output_tokens == self.output_tokens, "finished counts tokens that no delta had"
        )
        usage = frame.finished.usage
        assert self.started is not None
        counts = (usage.input_tokens, usage.output_tokens)
        wanted = (self.started.input_tokens, self.output_tokens)
        expect(counts == wanted, f"finished has usage {counts}, the frames had {wanted}")
        self.finished = frame.finished
