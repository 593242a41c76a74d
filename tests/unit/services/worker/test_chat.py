"""Chat templates: what they may do, and where they are stopped."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from libs.errors import InvalidArgument
from services.worker import chat
from services.worker.chat import ChatTemplate, TemplateInvalid, Turn
from services.worker.engine.sim_tokenizer import CHAT_TEMPLATE

TURNS = [Turn("system", "Be brief."), Turn("user", "Hi {{ 3 * 3 }}")]
NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)


def render(source: str, turns: list[Turn] = TURNS, **special: str) -> str:
    return ChatTemplate(source, special, lambda: NOON).render(turns)


def test_chatml() -> None:
    assert render(CHAT_TEMPLATE) == (
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
