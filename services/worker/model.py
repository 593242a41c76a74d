"""What of a model is the worker's: its text, its templates and formats, and what they allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from maas.common.v1 import capabilities_pb2

from services.worker.abilities import capabilities_of
from services.worker.chat import ChatTemplate, TemplateInvalid
from services.worker.config import ReasoningParser, ToolParser
from services.worker.engine.base import EngineInfo, EngineStartError, Tokenizer
from services.worker.formats import Formats, find_formats
from services.worker.prompt import PromptBuilder
from services.worker.text import TokenPieces
from services.worker.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One model on one engine. Everything in it is pure.

    Attributes:
        pieces: what its tokens spell.
        formats: that its output is written in.
        prompts: makes its prompts.
        vocabulary: text to ids and back.
        capabilities: what it can do here.
    """

    pieces: TokenPieces
    formats: Formats
    prompts: PromptBuilder
    vocabulary: Vocabulary
    capabilities: capabilities_pb2.Capabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSettings:
    """What is configured about a model; what is not, the model says itself.

    Attributes:
        chat_template: Jinja2 source that is used instead of its own; empty for none at all.
        tool_parser: format of its tool calls.
        reasoning_parser: format of its reasoning.
        disabled: flags of Capabilities that are switched off.
    """

    chat_template: str | None = None
    tool_parser: ToolParser | None = None
    reasoning_parser: ReasoningParser | None = None
    disabled: frozenset[str] = frozenset()


def read_template(path: Path | None) -> str | None:
    """Reads a chat template from a file; None without one. Blocks.

    Raises:
        EngineStartError: it cannot be read.
    """
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EngineStartError(f"worker.chat_template: {path} cannot be read: {error}") from error


def make_model(
    tokenizer: Tokenizer,
    info: EngineInfo,
    settings: TextSettings,
    *,
    bos_id: int | None,
    has_adapters: bool,
    now: Callable[[], datetime],
) -> Model:
    """Reads a whole vocabulary, about 1 us a token, so not on the event loop.

    Args:
        tokenizer: of the model.
        info: of the engine that runs it.
        settings: what is configured.
        bos_id: token that every prompt begins with; None for none.
        has_adapters: whether there can be adapters.
        now: the date, for templates that ask for it.

    Raises:
        EngineStartError: the chat template cannot be used.
    """
    pieces = TokenPieces.of(tokenizer)
    source = tokenizer.chat_template if settings.chat_template is None else settings.chat_template
    try:
        template = ChatTemplate(source, tokenizer.special_tokens, now) if source else None
    except TemplateInvalid as error:
        raise EngineStartError(str(error)) from error
    formats = find_formats(
        source,
        tokenizer,
        pieces,
        tool_parser=settings.tool_parser,
        reasoning_parser=settings.reasoning_parser,
    )
    return Model(
        pieces=pieces,
        formats=formats,
        prompts=PromptBuilder(
            tokenizer, pieces, template, bos_id=bos_id, context_length=info.context_length
        ),
        vocabulary=Vocabulary(tokenizer, pieces, bos_id=bos_id, context_length=info.context_length),
        capabilities=capabilities_of(
            info,
            template,
            formats,
            has_adapters=has_adapters,
            disabled=settings.disabled,
        ),
    )
