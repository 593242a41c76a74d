"""tools/conformance/frames.py: what a stream may be, and that everything else is refused."""

from __future__ import annotations

import pytest
from maas.common.v1 import usage_pb2
from maas.inference.v1 import generation_pb2

from tools.conformance.frames import FRAME_BYTES_MAX, Transcript
from tools.conformance.verdict import Mismatch

END = generation_pb2.OutputEnd(reason=generation_pb2.FINISH_REASON_MAX_TOKENS)
Frame = generation_pb2.GenerationFrame


def started(sequence: int = 1, *, name: str = "gen_1", inputs: int = 4) -> Frame:
    event = generation_pb2.Started(generation_id=name, input_tokens=inputs)
    return Frame(sequence=sequence, started=event)


def delta(
    sequence: int,
    count: int,
    *,
    text: str = "x",
    ids: int = 1,
    end: generation_pb2.OutputEnd | None = None,
    first: int = 0,
    index: int = 0,
) -> Frame:
    output = generation_pb2.OutputDelta(index=index, text=text, token_ids=range(ids), end=end)
    return Frame(
        sequence=sequence,
        first_sequence=first,
        output_tokens=count,
        delta=generation_pb2.Delta(outputs=[output]),
    )


def finished(sequence: int, count: int, *, inputs: int = 4, used: int | None = None) -> Frame:
    usage = usage_pb2.TokenUsage(input_tokens=inputs, output_tokens=count if used is None else used)
    return Frame(
        sequence=sequence, output_tokens=count, finished=generation_pb2.Finished(usage=usage)
    )


def read(*frames: Frame, with_token_ids: bool = True, may_merge: bool = False) -> Transcript:
    transcript = Transcript(with_token_ids=with_token_ids, may_merge=may_merge)
    for frame in frames:
        transcript.add(frame)
    transcript.complete()
    return transcript


def test_right_stream_is_taken() -> None:
    got = read(
        started(),
        delta(2, 1, text="a"),
        delta(3, 3, text="bc", ids=2),
        delta(4, 3, text="", ids=0, end=END),
        finished(5, 3),
    )

    assert (got.text, got.output_tokens, got.frames, got.deltas) == ("abc", 3, 5, 3)
    assert got.generation_id == "gen_1"
    assert got.end == END


def test_tokens_without_text_are_news() -> None:
    """Text may lag behind: an unfinished character, a possible stop sequence."""
    got = read(started(), delta(2, 1, text=""), delta(3, 2, end=END), finished(4, 2))

    assert got.token_ids == [0, 0]


WRONG = {
    "no frame": [],
    "no finished": [started(), delta(2, 1, end=END)],
    "no started": [delta(1, 1, end=END), finished(2, 1)],
    "second started": [started(), started(2), delta(3, 1, end=END), finished(4, 1)],
    "started without id": [started(name=""), delta(2, 1, end=END), finished(3, 1)],
    "started without prompt": [
        started(inputs=0), delta(2, 1, end=END), finished(3, 1, inputs=0)
    ],
    "gap": [started(), delta(3, 1, end=END), finished(4, 1)],
    "repeated number": [started(), delta(2, 1), delta(2, 2, end=END), finished(3, 2)],
    "first number is zero": [started(0), delta(1, 1, end=END), finished(2, 1)],
    "count falls": [started(), delta(2, 2, ids=2), delta(3, 1, ids=0, end=END), finished(4, 1)],
    "count is not that of the ids": [started(), delta(2, 2, ids=1, end=END), finished(3, 2)],
    "empty delta": [
        started(), delta(2, 1), delta(3, 1, text="", ids=0), delta(4, 2, end=END), finished(5, 2)
    ],
    "delta behind the end": [started(), delta(2, 1, end=END), delta(3, 2), finished(4, 2)],
    "two ends": [
        started(), delta(2, 1, end=END), delta(3, 1, text="", ids=0, end=END), finished(4, 1)
    ],
    "other output": [started(), delta(2, 1, end=END, index=1), finished(3, 1)],
    "finished without end": [started(), delta(2, 1), finished(3, 1)],
    "finished twice": [started(), delta(2, 1, end=END), finished(3, 1), finished(4, 1)],
    "finished counts more": [started(), delta(2, 1, end=END), finished(3, 2)],
    "usage is another count": [started(), delta(2, 1, end=END), finished(3, 1, used=2)],
    "prompt is another count": [started(), delta(2, 1, end=END), finished(3, 1, inputs=5)],
    "says nothing": [started(), Frame(sequence=2), delta(3, 1, end=END), finished(4, 1)],
    "delta without outputs": [
        started(), Frame(sequence=2, output_tokens=1, delta=generation_pb2.Delta())
    ],
    "merged without a replay": [started(), delta(3, 2, ids=2, first=2, end=END), finished(4, 2)],
    "too large": [started(), delta(2, 1, text="x" * FRAME_BYTES_MAX, end=END), finished(3, 1)],
}  # fmt: skip


@pytest.mark.parametrize("frames", WRONG.values(), ids=WRONG)
def test_wrong_stream_is_refused(frames: list[Frame]) -> None:
    with pytest.raises(Mismatch):
        read(*frames)


def test_token_ids_that_nobody_asked_for_are_refused() -> None:
    with pytest.raises(Mismatch, match="nobody asked"):
        read(started(), delta(2, 1, end=END), finished(3, 1), with_token_ids=False)


def test_replay_may_merge_deltas() -> None:
    got = read(started(), delta(4, 3, ids=3, first=2, end=END), finished(5, 3), may_merge=True)

    assert got.sequence == 5


@pytest.mark.parametrize(
    "frame", [delta(5, 3, ids=3, first=3), delta(3, 3, ids=3, first=1), delta(2, 3, ids=3, first=2)]
)
def test_merged_frame_has_to_begin_where_the_last_ended(frame: Frame) -> None:
    transcript = Transcript(with_token_ids=True, may_merge=True)
    transcript.add(started())

    with pytest.raises(Mismatch):
        transcript.add(frame)


def test_resumed_stream_goes_on_behind_the_last_frame() -> None:
    transcript = Transcript(with_token_ids=True)
    transcript.add(started())
    transcript.add(delta(2, 1))
    transcript.resume()

    with pytest.raises(Mismatch, match="expected frame 3"):
        transcript.add(delta(2, 1))
    transcript.add(delta(4, 3, ids=2, first=3, end=END))
    transcript.add(finished(5, 3))
    transcript.complete()

    assert transcript.output_tokens == 3
