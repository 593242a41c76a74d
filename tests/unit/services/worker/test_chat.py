"""Chat templates: what they may do, and where they are stopped."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from libs.chat_rules import JsonObject
from libs.errors import InvalidArgument
from services.worker import chat, templates
from services.worker.chat import ChatTemplate, Conversation, TemplateInvalid, Turn

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [Turn("system", "Be brief."), Turn("user", "Hi {{ 3 * 3 }}")]
NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)


def render(source: str, turns: list[Turn] = TURNS, **special: str) -> str:
    return ChatTemplate(source, special, lambda: NOON).render(turns)


def made(source: str) -> ChatTemplate:
    return ChatTemplate(source, {}, lambda: NOON)


def test_chatml() -> None:
    assert render(CHATML) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi {{ 3 * 3 }}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("{{ bos_token }}|{{ eos_token }}", "<s>|"),
        ("{% if add_generation_prompt %}\n  go\n{% endif %}\n", "  go\n"),
        ("{{ strftime_now('%d %B %Y') }}", "01 July 2026"),
        ("{{ messages[0] | tojson }}", '{"role": "system", "content": "Be brief."}'),
        ("{% if tools is not none %}tools{% endif %}{{ unheard_of }}", ""),
        ("{% for m in messages %}{{ loop.index }}{% break %}{% endfor %}", "1"),
        ("{% macro say(x) %}[{{ x }}]{% endmacro %}{{ say(messages[0].role) }}", "[system]"),
        ("{% set ns = namespace(n=0) %}{% set ns.n = 7 %}{{ ns.n * 6 }}", "42"),
        ("{{ '=' * 3 }}", "==="),
    ],
)
def test_what_templates_rely_on(source: str, want: str) -> None:
    assert render(source, bos_token="<s>", eos_token="") == want


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% for i in range(100001) %}{% endfor %}",
        "{% macro again() %}{{ again() }}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 'a' * 100000000000 }}",
        "{{ 100000000000 * 'a' }}",
        "{{ [1] * 100000000000 }}",
        "{{ 7 ** 100000000 }}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include 'other' %}",
        "{{ messages[9].content }}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_templates_may_not_do_is_refused(source: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        render(source)

    assert refused.value.metadata == {"field": "spec.chat"}
    assert "brief" not in str(refused.value)


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "RENDERED_CHARACTERS_MAX", 100)

    with pytest.raises(InvalidArgument, match="too long"):
        render("{% for i in range(30) %}{{ messages[0].content }}{% endfor %}")


def test_what_the_template_says_is_repeated_only_if_it_is_its_own() -> None:
    with pytest.raises(InvalidArgument, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidArgument) as refused:
        render("{{ raise_exception('not this: ' + messages[0].content) }}")
    assert "brief" not in str(refused.value)


@pytest.mark.parametrize(
    "source",
    ["{% for %}", "{{ x | no_such_filter }}", "{{", "x" * (chat.SOURCE_CHARACTERS_MAX + 1)],
)
def test_templates_that_cannot_be_used_are_refused_at_start(source: str) -> None:
    with pytest.raises(TemplateInvalid):
        ChatTemplate(source, {}, lambda: NOON)


@pytest.mark.parametrize(
    ("source", "knows_tools", "knows_reasoning"),
    [
        (CHATML, False, False),
        ("{% if tools %}{{ tools | tojson }}{% endif %}", True, False),
        ("{% macro show(tools) %}{{ tools }}{% endmacro %}{{ show(messages) }}", False, False),
        ("{% set tools = messages %}{{ tools }}", False, False),
        ("{% if enable_thinking %}{% endif %}", False, True),
        ("{{ messages[0].reasoning_content }}", False, True),
        ("{{ messages[0].content }}<think>\n", False, True),
        (templates.load("chatml_tools"), True, True),
    ],
)
def test_a_template_tells_what_it_knows(
    source: str, *, knows_tools: bool, knows_reasoning: bool
) -> None:
    template = made(source)

    assert template.knows_tools == knows_tools
    assert template.knows_reasoning == knows_reasoning


@pytest.mark.parametrize(
    ("arguments", "takes_texts"),
    [
        ("f.arguments | tojson", False),
        ("'```' + f.arguments", True),
        ("f.arguments if f.arguments is string else f.arguments | tojson", False),
        ("f.arguments.items() | list", False),
        ("f.arguments + raise_exception('never')", False),
    ],
)
def test_a_template_gets_arguments_as_it_wants_them(arguments: str, *, takes_texts: bool) -> None:
    source = (
        "{% for m in messages if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
        "{{ " + arguments + " }}{% endfor %}"
    )

    assert made(source).habits.takes_argument_texts == takes_texts


def continued(source: str, content: str) -> str:
    messages: list[JsonObject] = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": content},
    ]
    return made(source).render_conversation(Conversation(messages=messages, is_continued=True))


TRIMMING = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"


@pytest.mark.parametrize(
    "content", ["Once", "Once upon ", "a\nb\n\n", "", "[Go]", "\u16b0\u16b1\u16b2\u16b0"]
)
def test_the_text_ends_with_the_unfinished_message(content: str) -> None:
    assert continued(TRIMMING, content) == f"[Go][{content}"
    assert continued(CHATML, content).endswith(f"<|im_start|>assistant\n{content}")


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content.split('x')[-1] }}{% endfor %}",
        "{% for m in messages %}{{ m.content[:2] }}{% endfor %}",
    ],
)
def test_a_template_that_cannot_leave_a_message_unfinished_is_not_made_to(source: str) -> None:
    with pytest.raises(InvalidArgument, match="unfinished") as refused:
        continued(source, "an exact answer")

    assert refused.value.metadata == {"field": "spec.chat.continue_last_message"}


def test_json_is_written_as_templates_ask() -> None:
    source = (
        "{{ messages[0] | tojson(indent=1) }}"
        "{{ messages[0].role | tojson(ensure_ascii=False) }}"
        "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=True) }}"
    )

    assert render(source, [Turn("user", "é")]) == (
        '{\n "role": "user",\n "content": "é"\n}"user"{"content":"é","role":"user"}'
    )
