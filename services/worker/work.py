"""An admitted execution, as the worker runs it. Data; pure."""

from __future__ import annotations

import dataclasses
import hashlib
import string
from collections.abc import Callable
from dataclasses import dataclass

from services.worker.engine.base import Adapter, EngineRequest
from services.worker.formats import Formats
from services.worker.parsing import OutputParser
from services.worker.rich import Extras, RichOutput
from services.worker.stops import StopMatcher
from services.worker.text import TokenPieces

# The only ids that Mistral's templates take, so every model gets such; 53 bits of chance.
_CALL_ID_CHARACTERS = 9
_CALL_ID_ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True, kw_only=True)
class Splitting:
    """How the outputs of an execution are split into segments.

    Attributes:
        formats: those that apply.
        tool_names: of the functions that may be called.
        is_parallel: several calls in one turn are wanted.
        starts_in_reasoning: the prompt ends inside of it.
        key: what makes ids of calls unique.
    """

    formats: Formats
    tool_names: frozenset[str] = frozenset()
    is_parallel: bool = True
    starts_in_reasoning: bool = False
    key: str = ""

    def parser(self, output: int) -> OutputParser:
        """Makes the parser of an output.

        Args:
            output: its number.
        """
        return OutputParser(
            tools=self.formats.tools,
            tool_names=self.tool_names,
            parallel=self.is_parallel,
            reasoning=self.formats.reasoning,
            starts_in_reasoning=self.starts_in_reasoning,
            new_call_id=call_ids(self.key, output),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """An admitted execution.

    Attributes:
        requests: for the engine, one for each output.
        matcher: finds its stop sequences; None for none.
        includes_stop: the stop sequence that matches is shown.
        is_capped: max_output_tokens of the requests is what the charge limit allows, and less than
            what was asked for.
        extras: what is wanted besides text.
        splitting: None for output that is the answer as it is.
    """

    requests: tuple[EngineRequest, ...]
    matcher: StopMatcher | None
    includes_stop: bool
    is_capped: bool
    extras: Extras
    splitting: Splitting | None

    @property
    def input_tokens(self) -> int:
        """Of the prompt."""
        return len(self.requests[0].prompt_ids)

    @property
    def is_rich(self) -> bool:
        """Whether its outputs are more than text."""
        extras = self.extras
        return self.splitting is not None or extras.has_scores or extras.has_prompt_scores

    def rich(self, pieces: TokenPieces, output: int) -> RichOutput:
        """Makes what an output shows besides text.

        Args:
            pieces: of the vocabulary.
            output: its number.
        """
        splitting = self.splitting
        has_prompt = output == 0 and self.extras.has_prompt_scores
        return RichOutput(
            pieces,
            self.extras,
            parser=splitting.parser(output) if splitting is not None else None,
            marks=splitting.formats.marks if splitting is not None else None,
            may_become_plain=splitting is not None and splitting.formats.tools is None,
            prompt_ids=self.requests[0].prompt_ids if has_prompt else (),
        )

    def with_adapter(self, adapter: Adapter) -> Work:
        """Returns the same work with an adapter applied."""
        requests = tuple(dataclasses.replace(request, adapter=adapter) for request in self.requests)
        return dataclasses.replace(self, requests=requests)


def call_ids(key: str, output: int) -> Callable[[int], str]:
    """Makes what names the calls of an output: other executions have other names."""

    def new_call_id(call_index: int) -> str:
        named = f"{key}\0{output}\0{call_index}".encode()
        rest = int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "big")
        characters: list[str] = []
        for _ in range(_CALL_ID_CHARACTERS):
            rest, place = divmod(rest, len(_CALL_ID_ALPHABET))
            characters.append(_CALL_ID_ALPHABET[place])
        return "".join(characters)

    return new_call_id
