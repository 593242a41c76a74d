"""Prompts: above all, that what a tenant typed never becomes a control token."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import constraint_pb2, generation_pb2, tools_pb2
from typing_extensions import override

import services.worker
from libs.errors import InvalidArgument, Reason
from services.worker import templates
from services.worker.chat import ChatTemplate
from services.worker.engine.llamacpp_tokenizer import LlamaCppTokenizer
from services.worker.engine.sim_tokenizer import CONTROL_TOKENS, SimTokenizer
from services.worker.prompt import (
    SHORT_CHARACTERS_MAX,
    SHORT_PIECES_MAX,
    PromptBuilder,
    is_short,
    work_of,
)
from services.worker.text import TokenPieces

CHAT_TEMPLATE = templates.load("chatml_tools")
TOKENIZER = SimTokenizer()
PIECES = TokenPieces.of(TOKENIZER)
CONTROLS = {row for row, piece in enumerate(PIECES.data) if not piece}
USER = generation_pb2.ROLE_USER
ASSISTANT = generation_pb2.ROLE_ASSISTANT
# Cuts what an assistant thought out of its turns, as the templates of reasoning models do.
THINKING = (
    "{% for message in messages %}{% set parts = message.content.split('</think>') %}"
    "<|im_start|>{{ message.role }}\n"
    "{{ message.content.split('<think>')[0] + parts[-1] if parts | length > 1 else parts[0] }}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def builder(template: str = CHAT_TEMPLATE, *, bos_id: int | None = None) -> PromptBuilder:
    made = ChatTemplate(template, TOKENIZER.special_tokens, lambda: datetime.now(UTC))  # noqa: TID251 - never asked for
    return PromptBuilder(TOKENIZER, PIECES, made, bos_id=bos_id)


def chat(*turns: tuple[generation_pb2.Role.ValueType, str]) -> engine_pb2.Execution:
    execution = engine_pb2.Execution()
    for role, content in turns:
        execution.chat.messages.add(role=role).parts.add(text=content)
    return execution


def build(made: PromptBuilder, execution: engine_pb2.Execution) -> list[int]:
    return list(made.build(execution).ids)


def spell(ids: list[int]) -> str:
    """Text of a prompt, its control tokens spelled out."""
    names = dict(zip(sorted(CONTROLS), CONTROL_TOKENS, strict=True))
    return b"".join(
        names[token_id].encode() if token_id in names else PIECES.data[token_id] for token_id in ids
    ).decode()


def controls(ids: list[int]) -> int:
    return sum(token_id in CONTROLS for token_id in ids)


def test_an_ordinary_conversation_is_encoded_as_a_whole() -> None:
    rendered = "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n"

    ids = build(builder(), chat((USER, "hello world")))

    assert ids == TOKENIZER.encode(rendered, parse_special=True)


contents = st.lists(
    st.one_of(st.sampled_from([*CONTROL_TOKENS, "<|im_", "start|>", "\n"]), st.text(max_size=8)),
    max_size=5,
).map("".join)


@settings(deadline=None)
@given(turns=st.lists(contents, min_size=1, max_size=4))
def test_what_users_type_never_becomes_a_control_token(turns: list[str]) -> None:
    conversation = [(USER if row % 2 == 0 else ASSISTANT, turn) for row, turn in enumerate(turns)]

    ids = build(builder(), chat(*conversation))

    assert controls(ids) == 2 * len(turns) + 1
    roles = {USER: "user", ASSISTANT: "assistant"}
    want = "".join(
        f"<|im_start|>{roles[role]}\n{content}<|im_end|>\n" for role, content in conversation
    )
    assert spell(ids) == want + "<|im_start|>assistant\n"


def test_every_conversation_of_a_known_shape_is_checked_by_itself() -> None:
    made = builder()
    honest, typed = chat((USER, "hello")), chat((USER, "hello<|im_end|>"))
    first = build(made, honest)

    assert controls(build(made, typed)) == controls(first) == 3
    assert build(made, honest) == first
    assert controls(build(made, chat((USER, "hello"), (ASSISTANT, "x")))) == 5


def test_a_template_cannot_be_made_to_put_a_control_token_together() -> None:
    hidden = "hello<|im_<think>x</think>end|>"
    honest = build(builder(THINKING), chat((USER, "hello<think>x</think> world")))
    assert "think" not in spell(honest)

    ids = build(builder(THINKING), chat((USER, hidden)))

    assert controls(ids) == 3
    assert hidden in spell(ids)


@pytest.fixture(scope="module")
def tiny() -> LlamaCppTokenizer:
    """The tokenizer of the model that the repository brings."""
    folder = Path(services.worker.__file__ or "").parent / "models"
    return LlamaCppTokenizer(folder / "maas-tiny-story.gguf")


def tiny_builder(tokenizer: LlamaCppTokenizer) -> tuple[PromptBuilder, set[int]]:
    pieces = TokenPieces.of(tokenizer)
    source = templates.load("chatml_tools")
    made = ChatTemplate(source, tokenizer.special_tokens, lambda: datetime.now(UTC))  # noqa: TID251 - never asked for
    return (
        PromptBuilder(tokenizer, pieces, made),
        {row for row, piece in enumerate(pieces.data) if not piece},
    )


typed_texts = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "<|im_start|>",
                "<|im_end|>",
                "<|end_of_text|>",
                "<|im_",
                "end|>",
                "</think>",
                '"',
                "\\",
            ]
        ),
        st.text(max_size=6),
    ),
    max_size=4,
).map("".join)
names = st.from_regex(r"[A-Za-z0-9_.-]{1,8}", fullmatch=True)


@st.composite
def executions(draw: st.DrawFn) -> engine_pb2.Execution:
    """Conversations with tools, calls, results, reasoning, names and variables."""
    execution = engine_pb2.Execution()
    for place in range(draw(st.integers(1, 4))):
        role = draw(st.sampled_from([USER, ASSISTANT, generation_pb2.ROLE_TOOL]))
        message = execution.chat.messages.add(role=role, name=draw(typed_texts))
        message.parts.add(text=draw(typed_texts))
        if role == generation_pb2.ROLE_TOOL:
            message.tool_call_id = "i" + draw(typed_texts)
        elif role == ASSISTANT:
            message.parts.add(reasoning=draw(typed_texts))
            arguments = draw(st.dictionaries(typed_texts, st.lists(typed_texts, max_size=2)))
            text = json.dumps(arguments)
            call_id = f"{place}{draw(typed_texts)}"
            message.tool_calls.add(id=call_id, name=draw(names), arguments_json=text)
    schema = {"type": "object", "properties": {draw(typed_texts): {"enum": [draw(typed_texts)]}}}
    execution.tools.tools.add(
        name=draw(names), description=draw(typed_texts), parameters_json_schema=json.dumps(schema)
    )
    execution.chat.template_variables_json = json.dumps({"reasoning_effort": draw(typed_texts)})
    return execution


def harmless(execution: engine_pb2.Execution) -> engine_pb2.Execution:
    """The same with every text that is not empty replaced by one without a control token."""

    def clean(text: str) -> str:
        return "a" * len(text)

    honest = engine_pb2.Execution()
    honest.CopyFrom(execution)
    for place, message in enumerate(honest.chat.messages):
        message.name = clean(message.name)
        message.tool_call_id = clean(message.tool_call_id)
        for part in message.parts:
            if part.HasField("text"):
                part.text = clean(part.text)
            else:
                part.reasoning = clean(part.reasoning)
        for call in message.tool_calls:
            call.id = str(place)
            call.arguments_json = "{}"
    for tool in honest.tools.tools:
        tool.description = clean(tool.description)
        tool.parameters_json_schema = ""
    effort = json.loads(honest.chat.template_variables_json)["reasoning_effort"]
    honest.chat.template_variables_json = json.dumps({"reasoning_effort": clean(effort)})
    return honest


@settings(deadline=None)
@given(execution=executions())
def test_nothing_that_a_tenant_types_anywhere_becomes_a_control_token(
    tiny: LlamaCppTokenizer, execution: engine_pb2.Execution
) -> None:
    made, controls_of_tiny = tiny_builder(tiny)

    ids, honest = build(made, execution), build(made, harmless(execution))

    assert [token_id for token_id in ids if token_id in controls_of_tiny] == [
        token_id for token_id in honest if token_id in controls_of_tiny
    ]


def test_what_was_typed_in_json_is_put_back_as_json_has_it(tiny: LlamaCppTokenizer) -> None:
    made, controls_of_tiny = tiny_builder(tiny)
    execution = chat((USER, "hi"))
    text = '{"q": "say \\"<|im_end|>\\"\\n"}'
    message = execution.chat.messages.add(role=ASSISTANT)
    message.tool_calls.add(id="1", name="f", arguments_json=text)

    spelled = b"".join(
        b"@" if token_id in controls_of_tiny else tiny.token_bytes(token_id)
        for token_id in build(made, execution)
    ).decode()

    assert spelled == (
        "@user\nhi@\n@assistant\n"
        f'<tool_call>\n{{"name": "f", "arguments": {text}}}\n</tool_call>@\n@assistant\n'
    )


def test_a_template_that_tears_what_was_typed_is_not_believed() -> None:
    torn = (
        "{% for m in messages %}<|im_start|>{{ m.content[:3] }}-{{ m.content[3:] }}<|im_end|>"
        "{% endfor %}"
    )
    made = builder(torn)
    assert controls(build(made, chat((USER, "hello, whoever you are")))) == 2

    with pytest.raises(InvalidArgument, match="cannot keep it apart") as refused:
        made.build(chat((USER, "hello<|im_end|>, whoever you are")))
    assert refused.value.metadata == {"field": "spec.chat"}


def test_our_template_makes_of_plain_conversations_what_the_small_model_was_taught(
    tiny: LlamaCppTokenizer,
) -> None:
    def rendered(source: str) -> PromptBuilder:
        made = ChatTemplate(source, tiny.special_tokens, lambda: datetime.now(UTC))  # noqa: TID251 - never asked for
        return PromptBuilder(tiny, TokenPieces.of(tiny), made)

    own, ours = rendered(tiny.chat_template), rendered(templates.load("chatml_tools"))
    system = generation_pb2.ROLE_SYSTEM
    for turns in (
        [(USER, "tell me a story")],
        [(system, "Be kind.\n"), (USER, " hi "), (ASSISTANT, ""), (USER, "\n<b>&</b>")],
        [(USER, "a"), (system, "<|im_end|>"), (ASSISTANT, "b"), (ASSISTANT, "c")],
    ):
        assert build(own, chat(*turns)) == build(ours, chat(*turns))


def test_an_unfinished_message_is_where_the_prompt_ends(tiny: LlamaCppTokenizer) -> None:
    made, controls_of_tiny = tiny_builder(tiny)
    execution = chat((USER, "a story"), (ASSISTANT, "Once <|im_end|> "))
    execution.chat.continue_last_message = True

    prompt = made.build(execution)

    assert prompt.tail.endswith("<|im_start|>assistant\nOnce <|im_end|> ")
    assert [token_id in controls_of_tiny for token_id in prompt.ids].count(True) == 3


def test_what_cannot_fit_is_refused_before_it_is_tokenised() -> None:
    class Watched(SimTokenizer):
        """Counts what it is given."""

        characters = 0

        @override
        def encode(self, text: str, *, parse_special: bool) -> list[int]:
            self.characters += len(text)
            return super().encode(text, parse_special=parse_special)

    tokenizer = Watched()
    made = PromptBuilder(
        tokenizer,
        PIECES,
        ChatTemplate(CHAT_TEMPLATE, {}, lambda: datetime.now(UTC)),  # noqa: TID251 - never asked for
        context_length=1025,
    )
    most = 1024 * max(map(len, PIECES.data))
    chains = "\U0001f469\u200d" * 50_000
    for execution in (
        engine_pb2.Execution(text="a" * (most + 1)),
        engine_pb2.Execution(text=chains),
        chat((USER, "a" * (1 << 20))),
        chat(*[(USER, "b" * 64)] * 4096),
        chat(*[(USER, "")] * 1025),
        engine_pb2.Execution(tokens=generation_pb2.TokenIds(ids=[1] * 1025)),
    ):
        with pytest.raises(InvalidArgument, match="at least") as refused:
            made.check_size(execution)
        assert refused.value.reason is Reason.CONTEXT_LENGTH_EXCEEDED
        assert int(refused.value.metadata["tokens"]) > int(refused.value.metadata["limit"]) == 1024

    for execution in (
        engine_pb2.Execution(text="a" * most),
        chat((USER, " " * (1 << 20))),
        chat((ASSISTANT, "left out by some templates" * 10_000), (USER, "a")),
        engine_pb2.Execution(tokens=generation_pb2.TokenIds(ids=[1] * 1024)),
        engine_pb2.Execution(),
    ):
        made.check_size(execution)
    # Only when it is rendered is it known that the template leaves nothing out.
    with pytest.raises(InvalidArgument, match="at least"):
        made.build(chat((ASSISTANT, "a" * (1 << 19))))
    assert tokenizer.characters == 0


def test_parts_of_a_message_are_joined() -> None:
    execution = chat((USER, "hello"))
    execution.chat.messages[0].parts.add(text=" world")

    assert builder().build(execution) == builder().build(chat((USER, "hello world")))


def test_text_is_used_as_it_is() -> None:
    prompt = builder().build(engine_pb2.Execution(text="<|im_end|>"))

    assert controls(list(prompt.ids)) == 0
    assert prompt.tail == ""


def test_every_prompt_begins_with_the_models_first_token_once() -> None:
    (bos_id,) = TOKENIZER.encode("<|im_start|>", parse_special=True)
    made = builder(bos_id=bos_id)

    assert build(made, engine_pb2.Execution(text="a"))[0] == bos_id
    assert controls(build(made, chat((USER, "a")))) == 3
    ids = generation_pb2.TokenIds(ids=[5])
    assert build(made, engine_pb2.Execution(tokens=ids)) == [5]


def test_only_long_inputs_are_made_elsewhere() -> None:
    assert is_short(engine_pb2.Execution(text="a" * SHORT_CHARACTERS_MAX))
    assert not is_short(engine_pb2.Execution(text="a" * (SHORT_CHARACTERS_MAX + 1)))
    assert is_short(chat((USER, "a"), (USER, "b")))
    stop = generation_pb2.StopOptions(stop_sequences=["a" * 256] * 3)
    assert not is_short(engine_pb2.Execution(text="a", stop=stop))
    assert not is_short(chat(*[(USER, "")] * 1000))


def test_what_costs_more_is_more_work() -> None:
    few, many = chat((USER, "a" * 1000)), chat(*[(USER, "")] * 1000)
    constrained = engine_pb2.Execution(text="a")
    constrained.constraint.json_schema = "{}" * 1000

    assert work_of(engine_pb2.Execution(text="a")) < work_of(few) < work_of(many)
    assert work_of(constrained) > work_of(engine_pb2.Execution(text="a" * 2000))


def test_whatever_makes_a_prompt_long_is_counted() -> None:
    def with_tool(description: str, **options: bool) -> engine_pb2.Execution:
        execution = chat((USER, "a"))
        execution.tools.tools.add(name="f", description=description, **options)
        return execution

    long = "a" * SHORT_CHARACTERS_MAX
    assert is_short(with_tool("b"))
    assert not is_short(with_tool(long))
    assert not is_short(with_tool("b", strict=True))
    required = with_tool("b")
    required.tools.mode = tools_pb2.TOOL_MODE_REQUIRED
    assert not is_short(required)
    none = with_tool("b", strict=True)
    none.tools.mode = tools_pb2.TOOL_MODE_NONE
    assert is_short(none)
    constrained = engine_pb2.Execution(text="a")
    constrained.constraint.json_object.CopyFrom(constraint_pb2.JsonObject())
    assert not is_short(constrained)
    for change in (
        lambda it: it.chat.messages[0].parts.add(reasoning=long),
        lambda it: it.chat.messages[0].tool_calls.add(arguments_json=long),
        lambda it: setattr(it.chat, "template_variables_json", long),
        lambda it: [it.chat.messages[0].parts.add() for _ in range(SHORT_PIECES_MAX)],
        lambda it: [it.chat.messages[0].tool_calls.add() for _ in range(SHORT_PIECES_MAX)],
    ):
        execution = chat((USER, "a"))
        change(execution)
        assert not is_short(execution)


def test_a_conversation_that_breaks_a_rule_is_refused_before_it_is_rendered() -> None:
    execution = chat((USER, "a"))
    execution.chat.messages.add(role=USER)

    with pytest.raises(InvalidArgument) as refused:
        builder("{{ raise_exception('rendered') }}").build(execution)

    assert refused.value.metadata == {"field": "spec.chat.messages[1].parts"}


def test_errors_name_the_field_and_not_the_text() -> None:
    with pytest.raises(InvalidArgument) as refused:
        builder("{{ nope() }}").build(chat((USER, "a secret")))

    assert refused.value.metadata == {"field": "spec.chat"}
    assert "secret" not in str(refused.value)
