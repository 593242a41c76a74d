"""Outputs that are more than text: log-probabilities, token bytes, reasoning and calls."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2, scores_pb2
from typing_extensions import override

from services.worker.engine.base import (
    EndReason,
    Lane,
    Prefilled,
    PromptScores,
    StepBatch,
    TokenScores,
)
from services.worker.engine.sim_tokenizer import SimTokenizer
from tests.integration.services.worker.harness import (
    TOKENIZER,
    Gateway,
    Told,
    eventually,
    execution,
    running_worker,
)
from tests.integration.services.worker.scripted import ScriptedEngine

USER = generation_pb2.ROLE_USER
END = generation_pb2.FINISH_REASON_END
PADDING = 4_294_967_295
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'


def new_engine() -> ScriptedEngine:
    return ScriptedEngine(TOKENIZER.vocabulary_size)


def bytes_of(text: str) -> list[int]:
    """A token for each byte."""
    return list(text.encode())


def asking(
    lane: int = 1, *, chat: str = "", text: str = "x", **output: object
) -> engine_pb2.Execution:
    made = execution(lane, tokens=400, text=text, chat=[(USER, chat)] if chat else ())
    made.output.CopyFrom(generation_pb2.OutputOptions(**output))  # type: ignore[arg-type] # a test names its own fields
    return made


def with_tool(made: engine_pb2.Execution) -> engine_pb2.Execution:
    made.tools.tools.add(name="weather", description="Tells the weather.")
    return made


def scored(rows: Sequence[tuple[Lane, int, float, Sequence[tuple[int, float]]]]) -> StepBatch:
    """A batch in which every row has its log-probability and alternatives."""
    most = max(len(top) for _, _, _, top in rows)
    scores = TokenScores(logprobs=[logprob for _, _, logprob, _ in rows], top_count=most)
    for _, _, _, top in rows:
        padded = [*top, *[(-1, -math.inf)] * (most - len(top))]
        scores.top_token_ids += [token_id for token_id, _ in padded]
        scores.top_logprobs += [logprob for _, logprob in padded]
    return StepBatch(
        lanes=[lane for lane, *_ in rows], token_ids=[row[1] for row in rows], scores=scores
    )


async def lane_of(engine: ScriptedEngine, count: int = 1) -> list[Lane]:
    await eventually(lambda: len(engine.running) == count)
    return sorted(engine.running)


async def said(
    gateway: Gateway, engine: ScriptedEngine, made: engine_pb2.Execution, text: str
) -> Told:
    """Runs an execution to which the engine says a text, a byte at a time."""
    await gateway.send(made)
    (lane,) = await lane_of(engine)
    for token_id in bytes_of(text):
        engine.say(StepBatch(lanes=[lane], token_ids=[token_id]))
    engine.end(lane)
    await gateway.until_ended(made.lane)
    return gateway.told[made.lane]


async def test_log_probabilities_come_with_their_tokens() -> None:
    engine = new_engine()
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(asking(return_logprobs=True, top_logprobs=2))
        (lane,) = await lane_of(engine)
        assert engine.requests[lane].top_logprobs == 2
        engine.say(scored([(lane, 65, -0.5, [(65, -0.5), (66, -1.5)])]))
        engine.say(scored([(lane, 66, -2.0, [(67, -0.25)])]))
        engine.end(lane)
        await gateway.until_ended(1)

        told = gateway.told[1]
        assert told.text == "AB"
        assert told.scores.logprobs == [-0.5, -2.0]
        assert told.scores.top_count == 2
        assert told.scores.top_token_ids == [65, 66, 67, PADDING]
        assert told.scores.top_logprobs == [-0.5, -1.5, -0.25, -math.inf]
        assert not told.scores.token_bytes
        assert not told.segments


async def test_scores_wait_with_the_tokens_that_are_held() -> None:
    """A character of three bytes is one row, with three rows of scores."""
    engine = new_engine()
    euro = "€".encode()
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(asking(return_logprobs=True, return_token_bytes=True))
        (lane,) = await lane_of(engine)
        for number, byte in enumerate(euro):
            engine.say(scored([(lane, byte, -float(number), [])]))
        engine.end(lane)
        await gateway.until_ended(1)

        rows = [message for message in gateway.messages if message.lanes]
        assert [list(row.token_counts) for row in rows] == [[3]]
        told = gateway.told[1]
        assert told.text == "€"
        assert told.scores.logprobs == [0.0, -1.0, -2.0]
        assert b"".join(told.scores.token_bytes) == euro


async def test_only_who_asks_gets_scores_and_no_more_than_asked_for() -> None:
    engine = new_engine()
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(
            asking(1),
            asking(2, return_logprobs=True),
            asking(3, return_logprobs=True, top_logprobs=1),
        )
        first, second, third = await lane_of(engine, 3)
        for _ in range(4):
            top = [(65, -0.1), (66, -3.0)]
            engine.say(
                scored(
                    [(first, 65, math.nan, top), (second, 65, -0.1, top), (third, 66, -3.0, top)]
                )
            )
        for lane in (first, second, third):
            engine.end(lane)
        await gateway.until_ended(1, 2, 3)

        assert gateway.told[1].scores == scores_pb2.TokenScores()
        assert len(gateway.told[2].scores.logprobs) == 4
        assert not gateway.told[2].scores.top_token_ids
        assert gateway.told[3].scores.top_token_ids == [65] * 4
        assert [gateway.told[lane].text for lane in (1, 2, 3)] == ["AAAA", "AAAA", "BBBB"]


async def test_bytes_of_tokens_need_no_log_probabilities() -> None:
    engine = new_engine()
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        told = await said(gateway, engine, asking(return_token_bytes=True), "hä")

        assert engine.requests[max(engine.requests)].top_logprobs is None
        assert told.scores.token_bytes == [b"h", b"\xc3", b"\xa4"]
        assert not told.scores.logprobs


async def test_rows_that_wait_for_credit_keep_their_scores() -> None:
    engine = new_engine()
    async with running_worker(engine=engine) as worker, worker.gateway(grant=1) as gateway:
        await gateway.send(asking(1, return_logprobs=True), asking(2))
        await gateway.read()
        first, second = await lane_of(engine, 2)
        for number in range(5):
            engine.say(
                scored([(first, 65 + number, -float(number), []), (second, 97 + number, 0, [])])
            )
        engine.end(first)
        engine.end(second)
        await eventually(lambda: worker.executions.count == 0)
        await gateway.send(grant=1)
        message = await gateway.read()

        assert list(message.lanes) == [2, 1]
        assert list(message.texts) == ["abcde", "ABCDE"]
        assert list(message.token_counts) == [5, 5]
        assert [found.row for found in message.scores] == [1]
        assert gateway.told[1].scores.logprobs == [0.0, -1.0, -2.0, -3.0, -4.0]


async def test_the_prompts_log_probabilities_come_before_the_output_in_parts() -> None:
    engine = ScriptedEngine(TOKENIZER.vocabulary_size, context_length=10_000)
    size = 5000
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        made = asking(return_prompt_logprobs=True, return_logprobs=True, top_logprobs=1)
        made.tokens.ids.extend(number % 256 for number in range(size))
        made.output.count = 2
        made.more_lanes.append(2)
        await gateway.send(made)
        first, second = await lane_of(engine, 2)
        assert engine.requests[first].prompt_logprobs
        assert not engine.requests[second].prompt_logprobs
        scores = TokenScores(
            logprobs=[math.nan, *[-1.0] * (size - 1)],
            top_count=1,
            top_token_ids=[-1, *[7] * (size - 1)],
            top_logprobs=[-math.inf, *[-0.5] * (size - 1)],
        )
        engine.say(StepBatch(prompt_scores=[PromptScores(first, 0, scores)]))
        engine.say(scored([(first, 65, -1.0, []), (second, 66, -1.0, [])]))
        engine.end(first)
        engine.end(second)
        await gateway.until_ended(1, 2)

        parts = gateway.told[1].prompt_scores
        assert [(part.offset, len(part.scores.logprobs)) for part in parts] == [
            (0, 4096),
            (4096, 904),
        ]
        assert parts[0].scores.top_token_ids[:2] == [PADDING, 7]
        assert math.isnan(parts[0].scores.logprobs[0])
        assert parts[1].scores.token_ids[0] == 4096 % 256
        assert not gateway.told[2].prompt_scores


async def test_what_the_prefix_cache_had_is_said_once_and_only_if_it_had_something() -> None:
    engine = new_engine()
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        made = execution(1, more_lanes=[2], tokens=50)
        await gateway.send(made, execution(3, tokens=50))
        first, second, third = await lane_of(engine, 3)
        engine.say(
            StepBatch(
                lanes=[first, second, third],
                token_ids=[65, 66, 67],
                prefilled=[Prefilled(first, 16), Prefilled(second, 32), Prefilled(third, 0)],
            )
        )
        for lane in (first, second, third):
            engine.end(lane)
        await gateway.until_ended(1, 2, 3)

        assert [gateway.told[lane].cached_tokens for lane in (1, 2, 3)] == [16, None, None]


async def test_reasoning_is_split_from_the_answer_and_counted() -> None:
    engine = new_engine()
    text = "<think>\nhm, hm</think>\n\nYes."
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        told = await said(gateway, engine, asking(chat="Why?"), text)

        reasoning = "".join(item.reasoning for item in told.segments)
        answer = told.text + "".join(item.text for item in told.segments)
        assert (reasoning, answer) == ("hm, hm", "Yes.")
        assert told.token_ids == bytes_of(text), "marks are tokens of the output too"
        # The closing mark belongs to it; the opening one is seen only when it is whole.
        assert len("\nhm, hm</think>") <= told.reasoning_tokens <= len("<think>\nhm, hm</think>")
        assert told.end.reason == END


async def test_text_that_never_was_in_a_chat_is_not_split() -> None:
    engine = new_engine()
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        told = await said(gateway, engine, asking(), "<think>a</think>b")

        assert told.text == "<think>a</think>b"
        assert not told.segments


async def test_a_chat_without_reasoning_becomes_plain_text() -> None:
    engine = new_engine()
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(asking(chat="Why?"))
        (lane,) = await lane_of(engine)
        engine.say(StepBatch(lanes=[lane], token_ids=[65]))
        await gateway.read()
        run = worker.executions._delivery.running[lane]
        await eventually(lambda: run.rich is None)

        assert not run.is_matching
        assert run.text is None
        engine.say(StepBatch(lanes=[lane], token_ids=[66]))
        engine.end(lane)
        await gateway.until_ended(1)
        assert gateway.told[1].text == "AB"


async def test_a_lane_that_becomes_plain_has_one_row_in_a_message() -> None:
    engine = new_engine()
    async with running_worker(engine=engine) as worker, worker.gateway(grant=1) as gateway:
        await gateway.send(asking(chat="Why?"))
        await gateway.read()
        (lane,) = await lane_of(engine)
        for token_id in bytes_of("<think>a</think>answer"):
            engine.say(StepBatch(lanes=[lane], token_ids=[token_id]))
        engine.end(lane)
        await eventually(lambda: worker.executions.count == 0)
        await gateway.send(grant=1)
        message = await gateway.read()

        assert list(message.lanes) == [1]
        assert [item.WhichOneof("kind") for item in gateway.told[1].segments] == [
            "reasoning",
            *["text"] * (len(gateway.told[1].segments) - 1),
        ]
        assert "".join(item.text for item in gateway.told[1].segments) == "answer"


async def test_calls_are_split_from_the_text_as_they_come() -> None:
    engine = new_engine()
    text = f"I look.\n{CALL}"
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        told = await said(gateway, engine, with_tool(asking(chat="Weather?")), text)

        calls = [item.tool_call for item in told.segments if item.HasField("tool_call")]
        assert told.text + "".join(item.text for item in told.segments) == "I look."
        assert [call.name for call in calls if call.name] == ["weather"]
        assert [bool(call.id) for call in calls] == [True, *[False] * (len(calls) - 1)]
        assert "".join(call.arguments_json for call in calls) == '{"city": "Bonn"}'
        assert len(calls) > 3, "arguments come in fragments"
        assert told.token_ids == bytes_of(text)
        assert told.end.reason == generation_pb2.FINISH_REASON_TOOL_CALLS


async def test_calls_of_two_executions_have_different_ids() -> None:
    engine = new_engine()
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        first = await said(gateway, engine, with_tool(asking(1, chat="Weather?")), CALL + CALL)
        second = await said(gateway, engine, with_tool(asking(2, chat="Weather?")), CALL)

        ids = [
            item.tool_call.id
            for told in (first, second)
            for item in told.segments
            if item.tool_call.id
        ]
        assert len(ids) == len(set(ids)) == 3


async def test_an_output_that_was_cut_in_a_call_did_not_end_by_itself() -> None:
    engine = new_engine()
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(with_tool(asking(chat="Weather?")))
        (lane,) = await lane_of(engine)
        for token_id in bytes_of(CALL[:-20]):
            engine.say(StepBatch(lanes=[lane], token_ids=[token_id]))
        engine.end(lane, EndReason.MAX_TOKENS)
        await gateway.until_ended(1)

        assert gateway.told[1].end.reason == generation_pb2.FINISH_REASON_MAX_TOKENS
        assert gateway.told[1].token_ids == bytes_of(CALL[:-20])


async def test_without_tools_a_call_is_text() -> None:
    engine = new_engine()
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        told = await said(gateway, engine, asking(chat="Weather?"), CALL)

        assert told.text == CALL
        assert told.end.reason == END


async def test_a_stop_sequence_ends_a_split_output_and_shows_what_was_held() -> None:
    engine = new_engine()
    made = with_tool(asking(chat="Weather?"))
    made.stop.stop_sequences.append("STOP")
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(made)
        (lane,) = await lane_of(engine)
        # "<tool" may become a mark: the parser holds it, and the stop sequence decides.
        for token_id in bytes_of("a <toolSTOPb"):
            engine.say(StepBatch(lanes=[lane], token_ids=[token_id]))
        await gateway.until_ended(1)

        assert gateway.told[1].text == "a <tool"
        assert gateway.told[1].end.stop_sequence == "STOP"


async def test_an_abort_drops_what_the_parser_holds() -> None:
    engine = new_engine()
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(with_tool(asking(chat="Weather?")))
        (lane,) = await lane_of(engine)
        for token_id in bytes_of("ab<tool_c"):
            engine.say(StepBatch(lanes=[lane], token_ids=[token_id]))
        while gateway.told[1].text != "ab":
            await gateway.read()
        await gateway.send(abort_lanes=[1])
        await gateway.until_ended(1)

        assert gateway.told[1].reason == "CALL_CANCELLED"
        assert gateway.told[1].token_ids == bytes_of("ab")


class Marked(SimTokenizer):
    """Has the marks of calls as control tokens, as many models have."""

    @override
    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        marks = {"<tool_call>": 256, "</tool_call>": 257}
        if parse_special and text in marks:
            return [marks[text]]
        return super().encode(text, parse_special=parse_special)


async def test_marks_that_are_control_tokens_are_seen_by_the_parser_alone() -> None:
    engine = new_engine()
    made = with_tool(asking(chat="Weather?", return_logprobs=True))
    made.stop.stop_sequences.append("tool_call")
    call = bytes_of('{"name": "weather", "arguments": {}}')
    async with (
        running_worker(engine=engine, tokenizer=Marked()) as worker,
        worker.gateway() as gateway,
    ):
        await gateway.send(made)
        (lane,) = await lane_of(engine)
        token_ids = [*bytes_of("So "), 256, *call, 257]
        for number, token_id in enumerate(token_ids):
            engine.say(scored([(lane, token_id, -float(number), [])]))
        engine.end(lane)
        await gateway.until_ended(1)

        told = gateway.told[1]
        assert [item.tool_call.name for item in told.segments if item.tool_call.name] == ["weather"]
        assert told.end.reason == generation_pb2.FINISH_REASON_TOOL_CALLS
        assert told.token_ids == token_ids
        assert told.scores.logprobs == [-float(number) for number in range(len(token_ids))]


async def test_without_tools_such_marks_have_no_text() -> None:
    engine = new_engine()
    async with (
        running_worker(engine=engine, tokenizer=Marked()) as worker,
        worker.gateway() as gateway,
    ):
        await gateway.send(asking(chat="Weather?"))
        (lane,) = await lane_of(engine)
        for token_id in [65, 256, 66]:
            engine.say(StepBatch(lanes=[lane], token_ids=[token_id]))
        engine.end(lane)
        await gateway.until_ended(1)

        assert gateway.told[1].text == "AB"


class Thinking(SimTokenizer):
    """Has marks of calls and of reasoning as control tokens."""

    @override
    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        marks = {"<tool_call>": 256, "</think>": 257}
        if parse_special and text in marks:
            return [marks[text]]
        return super().encode(text, parse_special=parse_special)


@pytest.mark.parametrize("has_scores", [False, True], ids=["text", "scores"])
async def test_marks_that_mean_nothing_where_they_stand_have_no_text(has_scores: bool) -> None:  # noqa: FBT001 - a parameter of the test
    engine = new_engine()
    async with (
        running_worker(engine=engine, tokenizer=Thinking()) as worker,
        worker.gateway() as gateway,
    ):
        await gateway.send(asking(chat="Weather?", return_logprobs=has_scores))
        (lane,) = await lane_of(engine)
        # Nobody may call a tool, and behind the answer there is no reasoning.
        for token_id in [256, 65, 257, 66, 256, 257, 67]:
            engine.say(scored([(lane, token_id, -1.0, [])]))
        engine.end(lane)
        await gateway.until_ended(1)

        assert gateway.told[1].text == "ABC"
        assert gateway.told[1].token_ids == [256, 65, 257, 66, 256, 257, 67]


async def test_a_continuation_goes_on_in_the_middle_of_a_call() -> None:
    engine = new_engine()
    text = f"I look.\n{CALL}"
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        whole = await said(gateway, engine, with_tool(asking(1, chat="Weather?")), text)
        released = text.index('"Bonn"') + 2
        made = with_tool(asking(2, chat="Weather?"))
        made.continue_token_ids.extend(bytes_of(text[:released]))
        rest = await said(gateway, engine, made, text[released:])

        first = "".join(item.tool_call.arguments_json for item in whole.segments)
        second = "".join(item.tool_call.arguments_json for item in rest.segments)
        assert second
        assert first.endswith(second)
        assert rest.token_ids == bytes_of(text[released:])
        assert rest.end.reason == generation_pb2.FINISH_REASON_TOOL_CALLS


async def test_several_outputs_cannot_be_continued() -> None:
    engine = new_engine()
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(execution(1, more_lanes=[2], continues=[65]))
        await gateway.until_ended(1, 2)

        assert dict(gateway.told[1].failure.metadata) == {"field": "continue_token_ids"}


async def test_a_stop_sequence_that_is_included_is_shown_and_counted() -> None:
    engine = new_engine()
    made = asking()
    made.stop.stop_sequences.append("STOP")
    made.stop.include_stop = True
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        await gateway.send(made)
        (lane,) = await lane_of(engine)
        for token_id in bytes_of("go STOP!"):
            engine.say(StepBatch(lanes=[lane], token_ids=[token_id]))
        await gateway.until_ended(1)

        told = gateway.told[1]
        assert (told.text, told.end.stop_sequence) == ("go STOP", "STOP")
        assert told.token_ids == bytes_of("go STOP")


async def test_a_continuation_finds_no_stop_sequence_across_a_mark() -> None:
    engine = new_engine()
    made = with_tool(asking(chat="Weather?"))
    made.stop.stop_sequences.append("ab")
    made.continue_token_ids.extend([*bytes_of("a"), 256, *bytes_of("b")])
    async with (
        running_worker(engine=engine, tokenizer=Marked()) as worker,
        worker.gateway() as gateway,
    ):
        # The first worker has shown "a<tool_call>b", which is no call, and went on.
        told = await said(gateway, engine, made, "c")

        assert told.text == "c"
        assert told.end.reason == END
