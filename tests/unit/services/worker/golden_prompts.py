"""What the chat templates of seven families make of the same conversations.

The templates in golden/ are written by us after the families' public formats. Their renderings are
kept beside them; after a change that is meant, write them anew and look at the difference:

    python -m tests.unit.services.worker.golden_prompts
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2, tools_pb2

from libs.chat_rules import check_spec
from libs.errors import InvalidArgument
from services.worker import templates
from services.worker.chat import ChatTemplate
from services.worker.conversation import conversation_of, plain_turns

FOLDER = Path(__file__).parent / "golden"
NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
SYSTEM = generation_pb2.ROLE_SYSTEM
USER = generation_pb2.ROLE_USER
ASSISTANT = generation_pb2.ROLE_ASSISTANT
TOOL = generation_pb2.ROLE_TOOL
SCHEMA = (
    '{"type": "object", "properties": {"city": {"type": "string", "description": "Où?"}}, '
    '"required": ["city"]}'
)


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models.

    Attributes:
        name: of its files.
        controls: texts of its control tokens.
        bos: text that "bos_token" stands for.
        eos: text that "eos_token" stands for.
    """

    name: str
    controls: tuple[str, ...]
    bos: str = ""
    eos: str = ""

    def source(self) -> str:
        """Jinja2."""
        path = FOLDER / f"{self.name}.jinja"
        # Editors end files with a line end; templates do not.
        return (
            path.read_text("utf-8").removesuffix("\n")
            if path.exists()
            else templates.load(self.name)
        )

    def template(self, source: str | None = None) -> ChatTemplate:
        """The family's template, or another one with the family's tokens."""
        special = {"bos_token": self.bos, "eos_token": self.eos}
        return ChatTemplate(source or self.source(), special, lambda: NOON)


_DEEPSEEK = (
    "begin▁of▁sentence end▁of▁sentence User Assistant tool▁calls▁begin tool▁calls▁end "
    "tool▁call▁begin tool▁call▁end tool▁sep tool▁outputs▁begin tool▁outputs▁end "
    "tool▁output▁begin tool▁output▁end"
)
_PHI = "system user assistant tool /tool tool_call /tool_call tool_response end"
FAMILIES = (
    Family("chatml_tools", ("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"),
    Family("qwen2_5", ("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"),
    Family("qwen3", ("<|im_start|>", "<|im_end|>", "<think>", "</think>"), eos="<|im_end|>"),
    Family(
        "llama3",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    Family(
        "mistral_v3",
        (
            *("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        ),
        "<s>",
        "</s>",
    ),
    Family("gemma2", ("<bos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<end_of_turn>"),
    Family("phi4_mini", tuple(f"<|{name}|>" for name in _PHI.split()), eos="<|end|>"),
    Family(
        "deepseek_r1",
        tuple(f"<｜{name}｜>" for name in _DEEPSEEK.split()),  # noqa: RUF001 - as the family has it
        "<｜begin▁of▁sentence｜>",  # noqa: RUF001
        "<｜end▁of▁sentence｜>",  # noqa: RUF001
    ),
)


def say(
    execution: engine_pb2.Execution, role: generation_pb2.Role.ValueType, text: str
) -> generation_pb2.ChatMessage:
    """Adds a message to a conversation."""
    message = execution.chat.messages.add(role=role)
    message.parts.add(text=text)
    return message


def _system() -> engine_pb2.Execution:
    execution = engine_pb2.Execution()
    say(execution, SYSTEM, "Be brief.")
    say(execution, USER, "Hello!")
    return execution


def _turns() -> engine_pb2.Execution:
    execution = engine_pb2.Execution()
    say(execution, USER, " Hello! ")
    say(execution, ASSISTANT, "Hi.\n")
    say(execution, USER, "Who are you?\n\nSay it in <b>one</b> line.")
    return execution


def _tools(*, with_system: bool = True) -> engine_pb2.Execution:
    execution = engine_pb2.Execution()
    if with_system:
        say(execution, SYSTEM, "Be brief.")
    say(execution, USER, "Is it raining in Paris?")
    execution.tools.tools.add(
        name="get_weather", description="Tells the weather.", parameters_json_schema=SCHEMA
    )
    execution.tools.tools.add(name="get_time")
    return execution


def _add_call(execution: engine_pb2.Execution, *calls: tuple[str, str, str]) -> None:
    message = execution.chat.messages.add(role=ASSISTANT)
    for call_id, name, arguments in calls:
        message.tool_calls.add(id=call_id, name=name, arguments_json=arguments)


def _results() -> engine_pb2.Execution:
    execution = _tools()
    _add_call(execution, ("call00001", "get_weather", '{"city": "Paris"}'))
    say(execution, TOOL, '{"sky": "grey"}').tool_call_id = "call00001"
    return execution


def _parallel_results() -> engine_pb2.Execution:
    execution = _tools(with_system=False)
    _add_call(
        execution,
        ("call00001", "get_weather", '{"city": "Paris", "days": [1, 2.5, null, true]}'),
        ("call00002", "get_time", "{}"),
    )
    say(execution, TOOL, "grey").tool_call_id = "call00001"
    say(execution, TOOL, "noon").tool_call_id = "call00002"
    say(execution, ASSISTANT, "It is noon, and grey.")
    say(execution, USER, "Thanks.")
    return execution


def _no_tools() -> engine_pb2.Execution:
    execution = _tools()
    execution.tools.mode = tools_pb2.TOOL_MODE_NONE
    return execution


def _forgotten_tools() -> engine_pb2.Execution:
    execution = _results()
    execution.ClearField("tools")
    execution.chat.messages[2].parts.add(reasoning="I have to look.")
    return execution


def _reasoning(*, enabled: bool) -> engine_pb2.Execution:
    execution = engine_pb2.Execution()
    for question, thought, answer in (("1+1?", "One and one.", "2"), ("2+2?", "Two, twice.", "4")):
        say(execution, USER, question)
        message = execution.chat.messages.add(role=ASSISTANT)
        message.parts.add(reasoning=thought)
        message.parts.add(text=answer)
    say(execution, USER, "3+3?")
    execution.reasoning.enabled = enabled
    return execution


def _continued() -> engine_pb2.Execution:
    execution = engine_pb2.Execution()
    say(execution, USER, "Tell me a story.")
    say(execution, ASSISTANT, "Once upon a time, ")
    execution.chat.continue_last_message = True
    return execution


def _variables() -> engine_pb2.Execution:
    execution = _system()
    execution.chat.template_variables_json = '{"date_string": "a rainy day"}'
    return execution


CASES = {
    "system": _system(),
    "turns": _turns(),
    "tools": _tools(),
    "tools that the model is not told of": _no_tools(),
    "result": _results(),
    "result of a tool that is gone, and reasoning": _forgotten_tools(),
    "two results": _parallel_results(),
    "reasoning on": _reasoning(enabled=True),
    "reasoning off": _reasoning(enabled=False),
    "continued": _continued(),
    "variables": _variables(),
}


def render(template: ChatTemplate, execution: engine_pb2.Execution) -> str:
    """Renders the conversation of an execution, or says why not."""
    try:
        check_spec(execution)
        turns = plain_turns(execution)
        if turns is not None:
            return template.render(turns)
        return template.render_conversation(conversation_of(execution, template.habits))
    except InvalidArgument as error:
        return f"(refused) {error}"


def render_all(template: ChatTemplate) -> str:
    """Renders all conversations, each below its name."""
    return "".join(f"=== {name}\n{render(template, case)}\n" for name, case in CASES.items())


def sections(text: str) -> dict[str, str]:
    """Cuts what `render_all` made into conversations by name."""
    parts = re.split(r"^=== (.*)\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def main() -> None:
    """Writes all renderings anew."""
    for family in FAMILIES:
        (FOLDER / f"{family.name}.txt").write_text(render_all(family.template()), "utf-8")


if __name__ == "__main__":
    main()
