"""tools/conformance/frames.py: tool calls, several outputs and scores in a stream."""

from __future__ import annotations

import pytest
from maas.common.v1 import usage_pb2
from maas.inference.v1 import generation_pb2, scores_pb2, tools_pb2

from tools.conformance.frames import Transcript
from tools.conformance.verdict import Mismatch

END = generation_pb2.OutputEnd(reason=generation_pb2.FINISH_REASON_TOOL_CALLS)
Delta = generation_pb2.OutputDelta
Frame = generation_pb2.GenerationFrame
Part = tools_pb2.ToolCallDelta
Scores = scores_pb2.TokenScores


def read(
    *outputs: Delta, count: int = 1, prompt: tuple[tuple[int, Scores], ...] = ()
) -> Transcript:
    """Reads a stream with a frame for each part of the prompt's scores, and for each delta."""
    transcript = Transcript(with_token_ids=True, outputs=count)
    started = generation_pb2.Started(generation_id="gen_1", input_tokens=4)
    frames = [Frame(started=started)]
    frames += [
        Frame(prompt_scores=scores_pb2.PromptScores(offset=offset, scores=scores))
        for offset, scores in prompt
    ]
    tokens = 0
    for output in outputs:
        tokens += len(output.token_ids)
        frames.append(Frame(output_tokens=tokens, delta=generation_pb2.Delta(outputs=[output])))
    usage = usage_pb2.TokenUsage(input_tokens=4, output_tokens=tokens)
    frames.append(Frame(output_tokens=tokens, finished=generation_pb2.Finished(usage=usage)))
    for number, frame in enumerate(frames, start=1):
        frame.sequence = number
        transcript.add(frame)
    transcript.complete()
    return transcript


def test_calls_are_made_of_their_parts() -> None:
    got = read(
        Delta(tool_call=Part(id="c1", name="f", arguments_json="{"), token_ids=[1]),
        Delta(tool_call=Part(arguments_json="}"), token_ids=[2]),
        Delta(tool_call=Part(call_index=1, id="c2", name="g", arguments_json="[]"), token_ids=[3]),
        Delta(end=END),
    )

    assert [(call.id, call.name, call.arguments_json) for call in got.first.calls] == [
        ("c1", "f", "{}"),
        ("c2", "g", "[]"),
    ]


FIRST = Delta(tool_call=Part(id="c1", name="f"), token_ids=[1])


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (Part(call_index=1, arguments_json="x"), "no id or name"),
        (Part(call_index=2, id="c3", name="f"), "out of order"),
        (Part(id="c1", arguments_json="x"), "later part"),
        (Part(name="f", arguments_json="x"), "later part"),
    ],
)
def test_part_that_may_not_come_here_is_refused(part: Part, words: str) -> None:
    with pytest.raises(Mismatch, match=words):
        read(FIRST, Delta(tool_call=part, token_ids=[2]), Delta(end=END))


def test_outputs_are_told_apart() -> None:
    got = read(
        Delta(index=1, text="b", token_ids=[2]),
        Delta(index=0, text="a", token_ids=[1]),
        Delta(index=1, end=END),
        Delta(index=0, reasoning="why", token_ids=[3], end=END),
        count=2,
    )

    assert [got.outputs[index].text for index in (0, 1)] == ["a", "b"]
    assert (got.first.reasoning, got.token_ids) == ("why", [1, 3])


def test_every_output_has_to_end() -> None:
    with pytest.raises(Mismatch, match="before the end"):
        read(Delta(index=0, text="a", token_ids=[1], end=END), count=2)


def test_scores_are_joined_by_column() -> None:
    one = Scores(token_ids=[1], logprobs=[-1], top_count=1, top_token_ids=[7], top_logprobs=[0])
    other = Scores(token_ids=[2], logprobs=[-2], top_count=1, top_token_ids=[8], top_logprobs=[0])
    got = read(
        Delta(text="a", token_ids=[1], scores=one),
        Delta(text="b", token_ids=[2], scores=other, end=END),
    ).first.scores

    assert (list(got.token_ids), list(got.logprobs)) == ([1, 2], [-1, -2])
    assert (got.top_count, list(got.top_token_ids)) == (1, [7, 8])


def test_scores_of_other_tokens_are_refused() -> None:
    with pytest.raises(Mismatch, match="other tokens"):
        read(Delta(text="a", token_ids=[1], scores=Scores(token_ids=[2]), end=END))


def test_parts_of_the_prompts_scores_follow_each_other() -> None:
    output = Delta(text="a", token_ids=[1], end=END)
    parts = ((0, Scores(token_ids=[1, 2])), (2, Scores(token_ids=[3, 4])))

    assert list(read(output, prompt=parts).prompt_scores.token_ids) == [1, 2, 3, 4]
    with pytest.raises(Mismatch, match="begins at"):
        read(output, prompt=parts[::-1])
