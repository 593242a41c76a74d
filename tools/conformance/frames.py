"""The grammar of a token stream, checked frame by frame. Pure: no gRPC, no clock.

started delta* delta(end) finished       1, 2, 3, ... without a gap, over any number of calls
"""

from __future__ import annotations

from maas.inference.v1 import generation_pb2

from tools.conformance.verdict import Mismatch, expect

FRAME_BYTES_MAX = 256 * 1024


class Transcript:
    """What a reader has of one generation.

    Attributes:
        started: the first frame's content; None before it.
        finished: the last frame's content; None before it.
        end: how the output ended; None before that.
        text: all text so far.
        token_ids: all token ids so far; empty unless they were asked for.
        sequence: number of the last frame; 0 before the first.
        output_tokens: count of the last frame.
        frames: how many came.
        deltas: how many of them were deltas.
    """

    def __init__(self, *, with_token_ids: bool, may_merge: bool = False) -> None:
        """Begins with nothing.

        Args:
            with_token_ids: the request asked for them; then every count has to be theirs.
            may_merge: the frames are replayed: several deltas may come as one.
        """
        self._with_token_ids = with_token_ids
        self._may_merge = may_merge
        self._texts: list[str] = []
        self.started: generation_pb2.Started | None = None
        self.finished: generation_pb2.Finished | None = None
        self.end: generation_pb2.OutputEnd | None = None
        self.token_ids: list[int] = []
        self.sequence = 0
        self.output_tokens = 0
        self.frames = 0
        self.deltas = 0

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._texts)

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

    def _add_delta(self, frame: generation_pb2.GenerationFrame) -> None:
        number = frame.sequence
        expect(self.started is not None, f"delta {number} came before started")
        expect(self.end is None, f"delta {number} came after the end of the output")
        outputs = frame.delta.outputs
        expect(len(outputs) > 0, f"delta {number} has no outputs")
        news = frame.output_tokens - self.output_tokens
        has_news = news > 0
        ids: list[int] = []
        for output in outputs:
            expect(output.index == 0, f"delta {number} is of output {output.index}")
            expect(self.end is None, f"delta {number} goes on after the end of the output")
            has_news |= bool(output.text)
            self._texts.append(output.text)
            ids += output.token_ids
            if output.HasField("end"):
                self.end = output.end
        expect(has_news or self.end is not None, f"delta {number} says nothing new")
        if self._with_token_ids:
            expect(len(ids) == news, f"delta {number} counts {news} tokens and has {len(ids)} ids")
        else:
            expect(not ids, f"delta {number} has token ids that nobody asked for")
        self.token_ids += ids
        self.deltas += 1

    def _add_finished(self, frame: generation_pb2.GenerationFrame) -> None:
        expect(self.started is not None, "finished came before started")
        expect(self.end is not None, "finished came before the end of the output")
        expect(
            frame.output_tokens == self.output_tokens, "finished counts tokens that no delta had"
        )
        usage = frame.finished.usage
        assert self.started is not None
        counts = (usage.input_tokens, usage.output_tokens)
        wanted = (self.started.input_tokens, self.output_tokens)
        expect(counts == wanted, f"finished has usage {counts}, the frames had {wanted}")
        self.finished = frame.finished
