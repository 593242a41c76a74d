"""Deltas written by hand: contents, token ids, log-probabilities and ends of outputs.

There is one for nearly every token, and with log-probabilities they are large. Whatever is made
here fits into a frame: what would not is cut into several deltas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2, scores_pb2, tools_pb2

from services.gateway.wire import field, varint

# Numbers of fields with their wire types, as they stand on the wire (varints: 0, lengths: 2).
_DELTA_OUTPUTS = b"\x0a"
_OUTPUT_INDEX = b"\x08"
_OUTPUT_TEXT = b"\x12"
_OUTPUT_TOKEN_IDS = b"\x1a"
_OUTPUT_SCORES = b"\x22"
_OUTPUT_END = b"\x2a"
_OUTPUT_REASONING = b"\x32"
_OUTPUT_TOOL_CALL = b"\x3a"
# Characters of one content: four bytes each at most.
CONTENT_CHARACTERS_MAX = 24 * 1024
# Log-probabilities of one delta, bytes; with a content and token ids it is less than a frame.
SCORES_BYTES_MAX = 64 * 1024
# Token ids of one delta.
TOKEN_IDS_MAX = 8 * 1024
# Of a row of log-probabilities that has none.
NO_TOKEN = 0xFFFFFFFF


def contents(
    text: str, shown: engine_pb2.RowSegments | None, *, with_reasoning: bool
) -> list[bytes]:
    """Writes what a row shows: a field of OutputDelta for each piece.

    Args:
        text: whole characters; empty with `shown`.
        shown: what it shows, if not only text.
        with_reasoning: whether reasoning is among it.
    """
    if shown is None:
        if len(text) <= CONTENT_CHARACTERS_MAX:
            return [_text(_OUTPUT_TEXT, text)] if text else []
        return [_text(_OUTPUT_TEXT, part) for part in _parts(text)]
    made: list[bytes] = []
    for segment in shown.segments:
        match segment.WhichOneof("kind"):
            case "text":
                made += [_text(_OUTPUT_TEXT, part) for part in _parts(segment.text)]
            case "reasoning" if with_reasoning:
                made += [_text(_OUTPUT_REASONING, part) for part in _parts(segment.reasoning)]
            case "tool_call":
                made += [
                    field(_OUTPUT_TOOL_CALL, call.SerializeToString())
                    for call in _calls(segment.tool_call)
                ]
            case _:
                pass
    return made


def text_delta(index: int, text: str) -> bytes:
    """Writes the entry of Delta.outputs for text alone; empty for none. On the token path.

    Args:
        index: of the output.
        text: short enough for one delta.
    """
    if not text:
        return b""
    body = field(_OUTPUT_TEXT, text.encode("utf-8"))
    if index:
        body = _OUTPUT_INDEX + varint(index) + body
    return field(_DELTA_OUTPUTS, body)


def deltas(
    index: int,
    contents: Sequence[bytes],
    token_ids: Sequence[int],
    scores: scores_pb2.TokenScores | None,
) -> list[bytes]:
    """Writes entries of Delta.outputs for one row. On the token path.

    Token ids and scores stand beside its last content; if they are too many for one delta, those
    before the last stand in deltas without content, before it.

    Args:
        index: of the output.
        contents: what it shows.
        token_ids: to be sent; may be none.
        scores: to be sent.
    """
    head = _OUTPUT_INDEX + varint(index) if index else b""
    details = _details(token_ids, scores)
    if len(contents) <= 1 and len(details) <= 1:
        if not contents and not details:
            return []
        body = head + (contents[0] if contents else b"") + (details[0] if details else b"")
        return [field(_DELTA_OUTPUTS, body)]
    bodies = [*contents[:-1], *details[:-1]]
    bodies.append((contents[-1] if contents else b"") + (details[-1] if details else b""))
    return [field(_DELTA_OUTPUTS, head + body) for body in bodies]


def end(index: int, how: generation_pb2.OutputEnd) -> bytes:
    """Writes the entry of Delta.outputs that ends an output."""
    head = _OUTPUT_INDEX + varint(index) if index else b""
    return field(_DELTA_OUTPUTS, head + field(_OUTPUT_END, how.SerializeToString()))


def prompt_parts(offset: int, scores: scores_pb2.TokenScores) -> Iterator[bytes]:
    """Writes log-probabilities of a prompt as PromptScores, each of which fits into a frame."""
    for part in _split(scores):
        yield scores_pb2.PromptScores(offset=offset, scores=part).SerializeToString()
        offset += len(part.token_ids)


def scores_from(scores: scores_pb2.TokenScores, start: int) -> scores_pb2.TokenScores:
    """Returns the scores from a token on."""
    return _slice(scores, start, len(scores.token_ids))


def append_scores(whole: scores_pb2.TokenScores, more: scores_pb2.TokenScores) -> None:
    """Adds the scores of the tokens that follow. Rows with fewer alternatives are filled up."""
    width = max(whole.top_count, more.top_count)
    if whole.top_count != width:
        _widen(whole, width)
    if more.top_count != width:
        copy = scores_pb2.TokenScores()
        copy.CopyFrom(more)
        _widen(copy, width)
        more = copy
    whole.token_ids.extend(more.token_ids)
    whole.logprobs.extend(more.logprobs)
    whole.top_token_ids.extend(more.top_token_ids)
    whole.top_logprobs.extend(more.top_logprobs)
    whole.token_bytes.extend(more.token_bytes)
    whole.top_token_bytes.extend(more.top_token_bytes)


def _widen(scores: scores_pb2.TokenScores, width: int) -> None:
    """Fills rows up to a number of alternatives."""
    rows, had = len(scores.token_ids), scores.top_count
    ids, logprobs = list(scores.top_token_ids), list(scores.top_logprobs)
    spelt = list(scores.top_token_bytes)
    del scores.top_token_ids[:], scores.top_logprobs[:], scores.top_token_bytes[:]
    missing = width - had
    for row in range(rows):
        place = slice(row * had, row * had + had)
        scores.top_token_ids.extend([*ids[place], *[NO_TOKEN] * missing])
        scores.top_logprobs.extend([*logprobs[place], *[float("-inf")] * missing])
        if scores.token_bytes:
            scores.top_token_bytes.extend([*spelt[place], *[b""] * missing])
    scores.top_count = width


def _details(token_ids: Sequence[int], scores: scores_pb2.TokenScores | None) -> list[bytes]:
    """Writes token ids and scores: fields of OutputDelta, for as many deltas as they need."""
    if scores is None or not scores.token_ids:
        return [
            _ids(token_ids[start : start + TOKEN_IDS_MAX])
            for start in range(0, len(token_ids), TOKEN_IDS_MAX)
        ]
    data = scores.SerializeToString()
    if len(data) <= SCORES_BYTES_MAX and len(token_ids) <= TOKEN_IDS_MAX:
        return [_ids(token_ids) + field(_OUTPUT_SCORES, data)]
    made = []
    start = 0
    for part in _split(scores):
        stop = start + len(part.token_ids)
        made.append(_ids(token_ids[start:stop]) + field(_OUTPUT_SCORES, part.SerializeToString()))
        start = stop
    return made


def _split(scores: scores_pb2.TokenScores) -> Iterator[scores_pb2.TokenScores]:
    """Cuts scores into parts within both limits, by halves; one token is never cut."""
    rows = len(scores.token_ids)
    if rows <= 1 or (scores.ByteSize() <= SCORES_BYTES_MAX and rows <= TOKEN_IDS_MAX):
        yield scores
        return
    yield from _split(_slice(scores, 0, rows // 2))
    yield from _split(_slice(scores, rows // 2, rows))


def _slice(scores: scores_pb2.TokenScores, start: int, stop: int) -> scores_pb2.TokenScores:
    width = scores.top_count
    return scores_pb2.TokenScores(
        token_ids=scores.token_ids[start:stop],
        logprobs=scores.logprobs[start:stop],
        top_count=width,
        top_token_ids=scores.top_token_ids[start * width : stop * width],
        top_logprobs=scores.top_logprobs[start * width : stop * width],
        token_bytes=scores.token_bytes[start:stop],
        top_token_bytes=scores.top_token_bytes[start * width : stop * width],
    )


def _ids(token_ids: Sequence[int]) -> bytes:
    if not token_ids:
        return b""
    return field(_OUTPUT_TOKEN_IDS, b"".join([varint(token_id) for token_id in token_ids]))


def _text(head: bytes, text: str) -> bytes:
    return field(head, text.encode("utf-8"))


def _parts(text: str) -> Iterator[str]:
    for start in range(0, len(text), CONTENT_CHARACTERS_MAX):
        yield text[start : start + CONTENT_CHARACTERS_MAX]


def _calls(call: tools_pb2.ToolCallDelta) -> Iterator[tools_pb2.ToolCallDelta]:
    """Cuts the arguments of a call; id and name come with the first part."""
    if len(call.arguments_json) <= CONTENT_CHARACTERS_MAX:
        yield call
        return
    for number, part in enumerate(_parts(call.arguments_json)):
        yield tools_pb2.ToolCallDelta(
            call_index=call.call_index,
            id="" if number else call.id,
            name="" if number else call.name,
            arguments_json=part,
        )
