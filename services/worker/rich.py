"""An output that is more than text: split into segments, with log-probabilities and token bytes.

THE RULE of text.py holds here too: a token is released only together with what it completes. While
the parser holds characters back that may become a mark, the tokens that show them are held with
them, and so are tokens of which nothing is shown, as the marks themselves: they come with what is
shown next, or with the end. Log-probabilities wait with their tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from maas.engine.v1 import engine_pb2
from maas.inference.v1 import scores_pb2, tools_pb2

from services.worker.engine.base import PromptScores, TokenScores
from services.worker.parsing import CallPiece, OutputParser, Piece, ReasoningPiece, TextPiece
from services.worker.rows import Row
from services.worker.text import Release, TokenPieces

# Fills rows that have fewer alternatives, in the contract; engines fill with -1.
PADDING_ID = 4_294_967_295
# Tokens of a prompt in one part of its log-probabilities.
PROMPT_PART_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """What an execution wants besides text.

    Attributes:
        top: alternatives with each log-probability; None for no log-probabilities.
        has_bytes: bytes of each token.
        has_prompt_scores: log-probabilities of the prompt.
    """

    top: int | None
    has_bytes: bool
    has_prompt_scores: bool

    @property
    def has_scores(self) -> bool:
        """Whether every row has a column of scores."""
        return self.top is not None or self.has_bytes


NO_EXTRAS = Extras(top=None, has_bytes=False, has_prompt_scores=False)


class RichOutput:
    """One output. Stands behind its text layer.

    Attributes:
        extras: what goes with its tokens.
        is_unsplit: its text is the answer as it is.
    """

    __slots__ = (
        "_has_answered",
        "_logprobs",
        "_marks",
        "_may_become_plain",
        "_parser",
        "_pieces",
        "_prompt_ids",
        "_reasoning_tokens",
        "_shown",
        "_token_ids",
        "_top_ids",
        "_top_logprobs",
        "extras",
        "is_unsplit",
    )

    def __init__(
        self,
        pieces: TokenPieces,
        extras: Extras,
        *,
        parser: OutputParser | None = None,
        marks: Mapping[int, str] | None = None,
        may_become_plain: bool = False,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        """Keeps what it needs.

        Args:
            pieces: of the vocabulary.
            extras: what goes with its tokens.
            parser: splits the text; None for text that is the answer as it is.
            marks: texts that control tokens have for the parser, by id.
            may_become_plain: the parser looks for reasoning alone, which begins the output or does
                not come.
            prompt_ids: of the prompt, if its log-probabilities are wanted.
        """
        self.extras = extras
        self._pieces = pieces
        self._parser = parser
        self._marks = marks or {}
        self._may_become_plain = may_become_plain and not extras.has_scores
        self._prompt_ids = prompt_ids
        # Of tokens that have not been released, one after the other.
        self._logprobs: list[float] = []
        self._top_ids: list[int] = []
        self._top_logprobs: list[float] = []
        # Tokens that the parser has seen and that have not been released, and what they show.
        self._token_ids: list[int] = []
        self._shown: list[Piece] = []
        self._reasoning_tokens = 0
        self._has_answered = False
        self.is_unsplit = parser is None

    @property
    def has_calls(self) -> bool:
        """Whether the output has called a tool."""
        return self._parser is not None and self._parser.has_calls

    @property
    def is_plain(self) -> bool:
        """Whether all that comes is text of the answer, and nothing is held."""
        return (
            self._may_become_plain
            and self._has_answered
            and not self._token_ids
            and self._parser is not None
            and not self._parser.in_reasoning
        )

    def prime(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Goes on behind tokens that were released elsewhere, and with them what they show.

        Returns:
            those behind the last mark, in which a stop sequence may have begun.
        """
        if self._parser is None or not token_ids:
            return token_ids
        data = self._pieces.data
        begin = 0
        for place in [row for row, token_id in enumerate(token_ids) if token_id in self._marks]:
            self._know(data, token_ids[begin:place])
            self._parser.push(self.text_of_mark(token_ids[place]))
            begin = place + 1
        self._know(data, token_ids[begin:])
        return token_ids[begin:]

    def is_mark(self, token_id: int) -> bool:
        """Tells whether a token is a control token that may mean something to the parser."""
        return token_id in self._marks

    def text_of_mark(self, token_id: int) -> str:
        """Returns the text of such a token for the parser, which has seen all text before it.

        It has none where the parser would take it for a part of the answer.
        """
        mark = self._marks[token_id]
        return mark if self._parser is not None and self._parser.seeks(mark) else ""

    def add_scores(self, scores: TokenScores, row: int) -> None:
        """Takes the log-probabilities of the next token that the engine drew.

        Args:
            scores: of a batch.
            row: of the token.
        """
        most = self.extras.top
        if most is None:
            return
        self._logprobs.append(scores.logprobs[row])
        begin = row * scores.top_count
        found = min(most, scores.top_count)
        missing = most - found
        self._top_ids += scores.top_token_ids[begin : begin + found]
        self._top_logprobs += scores.top_logprobs[begin : begin + found]
        if missing:
            self._top_ids += [-1] * missing
            self._top_logprobs += [float("-inf")] * missing

    def single(self, token_id: int, text: str) -> Row:
        """Shows a token that is whole text. Only while `is_unsplit`, and nothing is held."""
        return Row([token_id], text, scores=self._scores((token_id,)))

    def push(self, release: Release) -> Row | None:
        """Takes what the text layer releases; returns what may be shown now."""
        token_ids = release.token_ids
        if not token_ids:
            return None
        parser = self._parser
        if parser is None:
            return Row(list(token_ids), release.text, scores=self._scores(token_ids))
        was_reasoning = parser.in_reasoning
        self._shown += parser.push(release.text)
        self._token_ids += token_ids
        if was_reasoning or parser.in_reasoning:
            self._reasoning_tokens += len(token_ids)
        if parser.held or not self._shown:
            return None
        return self._take()

    def finish(self) -> Row | None:
        """Returns everything held, at an end that is not an abort."""
        if self._parser is None:
            return None
        self._shown += self._parser.finish()
        # What is shown without a token was shown by tokens that another worker has released.
        return self._take() if self._token_ids else None

    def prompt_parts(self, found: PromptScores) -> Iterator[scores_pb2.PromptScores]:
        """Turns log-probabilities of the prompt into parts of bounded size."""
        scores = found.scores
        count = len(scores.logprobs)
        most = self.extras.top or 0
        kept = min(most, scores.top_count)
        for begin in range(0, count, PROMPT_PART_TOKENS):
            rows = range(begin, min(begin + PROMPT_PART_TOKENS, count))
            top_ids: list[int] = []
            top_logprobs: list[float] = []
            for row in rows:
                start = row * scores.top_count
                top_ids += scores.top_token_ids[start : start + kept]
                top_logprobs += scores.top_logprobs[start : start + kept]
            offset = found.offset + begin
            part = self._columns(
                self._prompt_ids[offset : offset + len(rows)],
                scores.logprobs[rows.start : rows.stop],
                top_ids,
                top_logprobs,
            )
            yield scores_pb2.PromptScores(offset=offset, scores=part)

    def _know(self, data: Sequence[bytes], token_ids: Sequence[int]) -> None:
        """Tells the parser of text that was released elsewhere."""
        if self._parser is not None:
            known = b"".join([data[token_id] for token_id in token_ids])
            self._parser.push(known.decode("utf-8", "replace"))

    def _take(self) -> Row:
        """Makes a row of all tokens that wait."""
        token_ids, shown, reasoning_tokens = self._token_ids, self._shown, self._reasoning_tokens
        self._token_ids, self._shown, self._reasoning_tokens = [], [], 0
        scores = self._scores(token_ids)
        if self._may_become_plain and not self._has_answered:
            self._has_answered = any(
                isinstance(piece, TextPiece) and not piece.text.isspace() for piece in shown
            )
        if not reasoning_tokens and all(isinstance(piece, TextPiece) for piece in shown):
            text = "".join(piece.text for piece in shown if isinstance(piece, TextPiece))
            return Row(token_ids, text, scores=scores)
        return Row(
            token_ids,
            segments=segments_of(shown),
            reasoning_tokens=reasoning_tokens,
            scores=scores,
        )

    def _scores(self, token_ids: Sequence[int]) -> scores_pb2.TokenScores | None:
        """Takes the scores of the oldest tokens, which are these."""
        if not self.extras.has_scores:
            return None
        count = len(token_ids)
        most = self.extras.top or 0
        top = count * most
        made = self._columns(
            token_ids, self._logprobs[:count], self._top_ids[:top], self._top_logprobs[:top]
        )
        del self._logprobs[:count]
        del self._top_ids[:top]
        del self._top_logprobs[:top]
        return made

    def _columns(
        self,
        token_ids: Sequence[int],
        logprobs: list[float],
        top_ids: list[int],
        top_logprobs: list[float],
    ) -> scores_pb2.TokenScores:
        if -1 in top_ids:
            top_ids = [PADDING_ID if token_id < 0 else token_id for token_id in top_ids]
        # In this order and by these calls it costs half of what the constructor's keywords cost.
        made = scores_pb2.TokenScores()
        made.token_ids.extend(token_ids)
        made.logprobs.extend(logprobs)
        if top_ids:
            made.top_count = len(top_ids) // len(token_ids)
            made.top_token_ids.extend(top_ids)
            made.top_logprobs.extend(top_logprobs)
        if self.extras.has_bytes:
            data = self._pieces.data
            made.token_bytes.extend([data[token_id] for token_id in token_ids])
            made.top_token_bytes.extend(
                [b"" if token_id == PADDING_ID else data[token_id] for token_id in top_ids]
            )
        return made


def segments_of(pieces: Sequence[Piece]) -> list[engine_pb2.Segment]:
    """Turns pieces into segments; neighbours of one kind become one."""
    segments: list[engine_pb2.Segment] = []
    for piece in pieces:
        last = segments[-1] if segments else None
        match piece:
            case TextPiece(text):
                if last is not None and last.HasField("text"):
                    last.text += text
                else:
                    segments.append(engine_pb2.Segment(text=text))
            case ReasoningPiece(text):
                if last is not None and last.HasField("reasoning"):
                    last.reasoning += text
                else:
                    segments.append(engine_pb2.Segment(reasoning=text))
            case CallPiece():
                _add_call(segments, piece)
    return segments


def _add_call(segments: list[engine_pb2.Segment], piece: CallPiece) -> None:
    last = segments[-1].tool_call if segments and segments[-1].HasField("tool_call") else None
    if last is not None and last.call_index == piece.call_index and not piece.name:
        last.arguments_json += piece.arguments
        return
    segments.append(
        engine_pb2.Segment(
            tool_call=tools_pb2.ToolCallDelta(
                call_index=piece.call_index,
                id=piece.call_id,
                name=piece.name,
                arguments_json=piece.arguments,
            )
        )
    )
