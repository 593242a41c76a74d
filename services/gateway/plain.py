"""Generations of one output that is nothing but text: nearly all of them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from maas.inference.v1 import generation_pb2, scores_pb2
from typing_extensions import override

from services.gateway import frames
from services.gateway.attempts import Attempts
from services.gateway.books import Books
from services.gateway.domain import Opening
from services.gateway.frames import Frame
from services.gateway.generation import Sink, new_sink, rest_of
from services.gateway.placement import Placed
from services.gateway.release import Batch
from services.gateway.replay import ReplayLog
from services.gateway.rich import AnySink
from services.gateway.running import Generation
from services.gateway.slices import Hold
from services.gateway.terms import Terms, Times


class PlainGeneration(Generation):
    """A generation of one output of text.

    Attributes:
        log: deltas that were released; None when nobody may come later.
    """

    log: ReplayLog | None

    def __init__(
        self,
        *,
        books: Books,
        opening: Opening,
        terms: Terms,
        hold: Hold,
        attempts: Attempts,
        placed: Placed,
        times: Times,
        log: ReplayLog | None,
        on_end: Callable[[Generation], None],
    ) -> None:
        """Takes over an execution that a worker has accepted. Raises as the journal does."""
        self._text_sink = _text(placed.sink)
        self._token_ids = array("I")
        self._end: generation_pb2.OutputEnd | None = None
        super().__init__(
            books=books,
            opening=opening,
            terms=terms,
            hold=hold,
            attempts=attempts,
            placed=placed,
            times=times,
            log=log,
            on_end=on_end,
        )

    @override
    def outputs(
        self,
    ) -> tuple[Sequence[generation_pb2.Output], scores_pb2.PromptScores | None]:
        """Returns the output, whole."""
        assert self.log is not None
        output = generation_pb2.Output(
            index=0,
            text=self.log.text(),
            token_ids=self._token_ids if self.terms.with_ids else (),
            end=self._end,
        )
        return [output], None

    @override
    def _release(self, batch: Batch, tokens_max: int) -> Frame | None:
        chunk = self._text_sink.take(tokens_max)
        token_ids = chunk.token_ids
        count = self.output_tokens + len(token_ids)
        if count > self.terms.max_output_tokens:
            self._overrun()
            return None
        if token_ids:
            batch.progress.append((self._ordinal, count))
            self._token_ids.extend(token_ids)
            self.output_tokens = count
            if self.first_s is None:
                self._begin(batch)
        if self.log is not None:
            self.log.append(chunk.text, count)
        self.sequence += 1
        if chunk.end is not None:
            self._end = chunk.end
            self._has_all = True
            batch.ended.append(self)
        return frames.delta(
            sequence=self.sequence,
            text=chunk.text,
            token_ids=token_ids if self.terms.with_ids else (),
            end=chunk.end,
            output_tokens=count,
        )

    @override
    def _released(self, number: int) -> Frame | None:
        replayed = self.log.read(number) if self.log is not None else None
        if replayed is None:
            return None
        last = replayed.last + 2
        is_last = self._end is not None and last == self.sequence - int(self._is_complete)
        ids = self._token_ids[replayed.tokens_before : replayed.tokens_after]
        return frames.delta(
            sequence=last,
            first_sequence=replayed.first + 2 if replayed.last > replayed.first else 0,
            text=replayed.text,
            token_ids=ids if self.terms.with_ids else (),
            end=self._end if is_last else None,
            output_tokens=replayed.tokens_after,
        )

    @override
    def _suspend(self) -> Sequence[int] | None:
        if not self.terms.is_exact:
            # Nobody may have seen its beginning: then it begins anew.
            self._take_over(new_sink())
            return None if self.sequence > 1 else []
        self._take_over(rest_of(self._text_sink))
        return [*self._token_ids, *self._text_sink.token_ids]

    @override
    def _new_sink(self) -> AnySink:
        return new_sink()

    @override
    def _go_on_with(self, sink: AnySink) -> None:
        following = _text(sink)
        following.adopt(self._text_sink)
        self._take_over(following)

    def _take_over(self, sink: Sink) -> None:
        self._sink = self._text_sink = sink


def _text(sink: AnySink) -> Sink:
    assert isinstance(sink, Sink)
    return sink
