r"""What the simulator is determined to say because of the form of its prompt.

It reads the forms of templates/chatml_tools.jinja, as a model trained on them would have learnt:

    ...<|im_start|>assistant\n<think>\n            thinks for a sentence, closes the block, answers
    system turn with the list of functions,
    and the last turn is a user's              calls the functions that this turn names, else one;
                                               arguments match their schemas
    and the last turn is a tool's result       answers in plain words

Everything else has no script. Bounded: who has no such form pays for a look at both ends of the
prompt; FUNCTIONS_MAX functions are read, CALLS_MAX called, ARGUMENTS_MAX tokens written for each.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass

from llguidance import LLMatcher

from services.worker.engine.base import ConstraintKind, EngineRequest
from services.worker.engine.matcher import MatcherError, MatcherFactory
from services.worker.engine.sim_choice import Choices, choice_of, write
from services.worker.engine.sim_output import SimOutput, mix
from services.worker.engine.sim_tokenizer import SimTokenizer

FUNCTIONS_MAX = 128
CALLS_MAX = 4
ARGUMENTS_MAX = 512
# The last turn's mark and what a template writes behind it are shorter.
_TAIL_MAX = 32
_THOUGHT_TOKENS = 9
_THOUGHT = 0x7468696E6B


@dataclass(frozen=True, slots=True)
class Script:
    """What to say, if nothing forbids it.

    Attributes:
        parts: UTF-8, one after the other; one that cannot be begun is left out.
        is_whole: the output ends behind it.
    """

    parts: tuple[bytes, ...] = ()
    is_whole: bool = False


@dataclass(frozen=True, slots=True)
class _Function:
    name: str
    parameters: str


class Scripts:
    """The marks of one vocabulary."""

    def __init__(self, tokenizer: SimTokenizer, output: SimOutput, choices: Choices) -> None:
        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, parse_special=True)

        self._output = output
        self._choices = choices
        self._turn, self._turn_end = encode("<|im_start|><|im_end|>")
        self._system = tuple(encode("<|im_start|>system"))
        self._assistant = tuple(encode("<|im_start|>assistant"))
        self._thinking = tuple(encode("<|im_start|>assistant\n<think>\n"))
        self._functions = array("I", encode(" may call one or more of these functions")).tobytes()

    def is_thinking(self, request: EngineRequest) -> bool:
        """Whether the prompt ends in a block of reasoning."""
        return request.prompt_ids[-len(self._thinking) :] == self._thinking

    def has_functions(self, request: EngineRequest) -> bool:
        """Whether the prompt begins with a list of functions and ends where the model answers."""
        ids = request.prompt_ids
        if ids[: len(self._system)] != self._system:
            return False
        return self._functions in array("I", ids).tobytes() and self._answer_at(ids) is not None

    def make(self, request: EngineRequest, base: int, factory: MatcherFactory | None) -> Script:
        """Makes the script of a request. 100 us a token of arguments.

        Args:
            request: any.
            base: 64 bits of prompt and seed.
            factory: for arguments; None for a request that has neither functions nor constraint.
        """
        thoughts = (self._thought(base),) if self.is_thinking(request) else ()
        constraint = request.constraint
        if constraint is not None and constraint.kind is ConstraintKind.CHOICES:
            texts: list[str] = json.loads(constraint.source)
            return Script((*thoughts, choice_of(texts, base)))
        calls = self._calls(request.prompt_ids, base, factory) if factory is not None else b""
        return Script((*thoughts, calls), is_whole=True) if calls else Script(thoughts)

    def _thought(self, base: int) -> bytes:
        """One sentence, and the mark that ends the block."""
        tokens = self._output.tokens(base ^ _THOUGHT, 0, _THOUGHT_TOKENS).tolist()
        words = self._text(tuple(tokens)).replace(".", "").strip()
        return f"{words}.\n</think>\n\n".encode()

    def _text(self, ids: tuple[int, ...]) -> str:
        pieces = self._choices.pieces
        return b"".join(pieces[token_id] for token_id in ids).decode(errors="replace")

    def _answer_at(self, ids: tuple[int, ...]) -> int | None:
        """Where the turn begins that the model has to write."""
        for at in range(len(ids) - 1, max(-1, len(ids) - 1 - _TAIL_MAX), -1):
            if ids[at] == self._turn:
                is_open = ids[at : at + len(self._assistant)] == self._assistant
                return at if is_open else None
        return None

    def _calls(self, ids: tuple[int, ...], base: int, factory: MatcherFactory) -> bytes:
        answer_at = self._answer_at(ids)
        if ids[: len(self._system)] != self._system or answer_at is None:
            return b""
        system = ids[: ids.index(self._turn_end)] if self._turn_end in ids else ids
        functions = _functions_of(self._text(system))
        turn_at = max((at for at in range(answer_at) if ids[at] == self._turn), default=0)
        question = self._text(ids[turn_at:answer_at]).strip()
        if not functions or not question.startswith("user"):
            return b""
        if question.endswith("</tool_response>"):
            return b""
        named = [function for function in functions if _is_named(function.name, question)]
        called = named[:CALLS_MAX] or [functions[mix(base, 0) % len(functions)]]
        return "\n".join(
            self._call(function, mix(base, at + 1), factory) for at, function in enumerate(called)
        ).encode()

    def _call(self, function: _Function, base: int, factory: MatcherFactory) -> str:
        arguments = None
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                function.parameters, overrides={"whitespace_flexible": False}
            )
            arguments = write(
                factory.make(grammar),
                self._choices,
                ConstraintKind.JSON_SCHEMA,
                base=base,
                most=ARGUMENTS_MAX,
            )
        except (MatcherError, ValueError):
            # Schemas of functions that are not strict may be anything.
            arguments = None
        said = arguments.decode() if arguments is not None else "{}"
        name = json.dumps(function.name)
        return f'<tool_call>\n{{"name": {name}, "arguments": {said}}}\n</tool_call>'


def _functions_of(system: str) -> list[_Function]:
    """Reads the list of functions, one JSON object in each line; skips what is none."""
    _, _, rest = system.rpartition("<tools>\n")
    lines = rest.partition("\n</tools>")[0].split("\n")[:FUNCTIONS_MAX]
    found = []
    for line in lines:
        try:
            function = json.loads(line)["function"]
            name, parameters = function["name"], function.get("parameters")
            schema = json.dumps(parameters if isinstance(parameters, dict) else {"type": "object"})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        if isinstance(name, str):
            found.append(_Function(name, schema))
    return found


def _is_named(name: str, question: str) -> bool:
    asked = question.lower()
    return name.lower() in asked or name.lower().replace("_", " ") in asked
