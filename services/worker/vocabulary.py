"""Tokenize and detokenize, and inputs of embeddings: a model's vocabulary by itself. Pure."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from maas.engine.v1 import engine_service_pb2 as engine_service_pb
from maas.inference.v1 import embedding_service_pb2

from libs.errors import FieldRule, InvalidArgument, Reason, Violation, invalid_field
from services.worker.engine.base import Tokenizer
from services.worker.text import TokenPieces


class Vocabulary:
    """Text to token ids and back. May be used from any thread."""

    def __init__(
        self, tokenizer: Tokenizer, pieces: TokenPieces, *, bos_id: int | None, context_length: int
    ) -> None:
        """Keeps what it needs.

        Args:
            tokenizer: of the model.
            pieces: of the same vocabulary.
            bos_id: token that every prompt of this model begins with; None for none.
            context_length: most tokens of an input that is embedded.
        """
        self._tokenizer = tokenizer
        self._pieces = pieces
        self._bos_id = bos_id
        self._context_length = context_length
        self._piece_bytes_max = max(map(len, pieces.data), default=1) or 1

    def tokenize(
        self, request: engine_service_pb.TokenizeRequest
    ) -> engine_service_pb.TokenizeResponse:
        """Turns text into ids. What looks like a control token is text."""
        ids = self._encode(request.text, has_bos=request.add_special_tokens)
        data = self._pieces.data
        return engine_service_pb.TokenizeResponse(
            token_ids=ids,
            token_bytes=[data[token_id] for token_id in ids] if request.return_token_bytes else (),
        )

    def detokenize(
        self, request: engine_service_pb.DetokenizeRequest
    ) -> engine_service_pb.DetokenizeResponse:
        """Turns ids into text.

        Raises:
            InvalidArgument: an id is not in the vocabulary.
        """
        ids = request.tokens.ids
        self._check(ids, "tokens.ids")
        data = b"".join([self._pieces.data[token_id] for token_id in ids])
        text, used = codecs.utf_8_decode(data, "replace", False)
        return engine_service_pb.DetokenizeResponse(text=text, incomplete=data[used:])

    def embed_input(
        self, item: embedding_service_pb2.EmbedInput, place: int, *, may_cut: bool
    ) -> tuple[list[int], bool]:
        """Turns an input into what is embedded of it; tells whether it was cut.

        Args:
            item: the input.
            place: its number among the inputs.
            may_cut: cut it where it is too long, instead of refusing it.

        Raises:
            InvalidArgument: it is empty or too long, or an id is not in the vocabulary.
        """
        most = self._context_length
        ids: list[int] = []
        match item.WhichOneof("input"):
            case "text":
                size = len(item.text.encode("utf-8"))
                if size > most * self._piece_bytes_max and not may_cut:
                    # No token spells more than the longest: this needs no counting.
                    raise self._too_long(place, -(-size // self._piece_bytes_max))
                ids = self._encode(item.text, has_bos=True)
            case "tokens":
                ids = list(item.tokens.ids)
                self._check(ids, f"inputs[{place}].tokens.ids")
            case None:
                pass
        if not ids:
            raise invalid_field(f"inputs[{place}]", FieldRule.REQUIRED, "must not be empty")
        if len(ids) <= most:
            return ids, False
        if not may_cut:
            raise self._too_long(place, len(ids))
        return ids[:most], True

    def _encode(self, text: str, *, has_bos: bool) -> list[int]:
        ids = self._tokenizer.encode(text, parse_special=False) if text else []
        if has_bos and self._bos_id is not None and (not ids or ids[0] != self._bos_id):
            return [self._bos_id, *ids]
        return ids

    def _check(self, ids: Sequence[int], field: str) -> None:
        size = len(self._pieces.data)
        if not ids or max(ids) < size:
            return
        place = next(row for row, token_id in enumerate(ids) if token_id >= size)
        raise invalid_field(
            f"{field}[{place}]",
            FieldRule.OUT_OF_RANGE,
            f"must be below {size}, the size of the vocabulary",
        )

    def _too_long(self, place: int, tokens: int) -> InvalidArgument:
        field = f"inputs[{place}]"
        said = f"has at least {tokens} tokens; at most {self._context_length} can be embedded"
        return InvalidArgument(
            f"{field}: {said}",
            reason=Reason.CONTEXT_LENGTH_EXCEEDED,
            metadata={"tokens": str(tokens), "limit": str(self._context_length)},
            violations=[Violation(field, FieldRule.TOO_LONG, said)],
        )
