"""The stand-in's model: what it says to a request, and how that is cut into deltas. Pure.

The logits of a position follow from prompt, adapter and position; all the rest is as the contract
says, or wrong in one way.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from maas.inference.v1 import generation_pb2, scores_pb2, tools_pb2
from numpy.typing import NDArray

from tests.integration.tools.conformance import request_text
from tests.integration.tools.conformance.request_faults import Wrong
from tests.integration.tools.conformance.request_text import (
    CALL,
    CALLED,
    EOS,
    SIZE,
    THINK,
    THOUGHT,
    bytes_of,
    encode,
)

Row = NDArray[np.float64]
_PADDING = 0xFFFFFFFF
_THOUGHTS = 10
_NEVER = -20.0
_STOPPED = generation_pb2.FINISH_REASON_STOP_SEQUENCE
Spec = generation_pb2.GenerationSpec


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How the model is wrong.

    Attributes:
        wrong: one way.
        ignored: flag that is true and ignored; empty for none.
    """

    wrong: Wrong = Wrong.NOTHING
    ignored: str = ""


@dataclasses.dataclass(slots=True, kw_only=True)
class Said:
    """One output.

    Attributes:
        ids: its tokens.
        rows: log-probabilities before each of them.
        reason: how it ended.
        call: name of the tool that all of it calls; empty for none.
        thoughts: leading tokens that are reasoning.
        limit: characters of the text that are shown.
        stop: stop sequence that matched.
        stop_token: stop token that matched.
    """

    ids: list[int]
    rows: list[Row]
    reason: generation_pb2.FinishReason.ValueType
    call: str = ""
    thoughts: int = 0
    limit: int | None = None
    stop: str = ""
    stop_token: int | None = None


class Speaker:
    """Says one output of a request."""

    def __init__(self, spec: Spec, prompt: Sequence[int], seed: int, manner: Manner) -> None:
        self._spec = spec
        self._seed = seed
        self._manner = manner
        self._prompt = frozenset(prompt)
        adapter = spec.adapter if manner.ignored != "adapters" else ""
        self._key = hashlib.blake2b(f"{adapter}|{list(prompt)}".encode()).digest()
        self._ids: list[int] = []
        self._rows: list[Row] = []

    def say(self) -> Said:
        """Says it.

        Raises:
            request_text.Refused: the constraint is malformed.
        """
        spec, ignored = self._spec, self._manner.ignored
        tool = self._called_tool()
        if tool is not None:
            said = self._forced(self._call(tool))
            said.reason = generation_pb2.FINISH_REASON_TOOL_CALLS
            if self._manner.wrong is Wrong.CALL_END:
                said.reason = generation_pb2.FINISH_REASON_END
            said.call = tool.name
            return said
        if spec.constraint.WhichOneof("kind") not in (None, ignored):
            text = request_text.allowed_text(spec.constraint, self._seed)
            if self._manner.wrong is Wrong.SCHEMA_BROKEN and self._seed % 10 == 9:
                text = "{"
            return self._cut(self._forced(encode(text)))
        thoughts = self._think() if spec.reasoning.enabled else 0
        said = self._free()
        said.thoughts = thoughts
        return said

    def _cut(self, said: Said) -> Said:
        if self._manner.wrong is Wrong.SCHEMA_CUT:
            said.ids = said.ids[:-1]
            said.reason = generation_pb2.FINISH_REASON_MAX_TOKENS
        return said

    def _called_tool(self) -> tools_pb2.Tool | None:
        options = self._spec.tools
        is_required = options.mode == tools_pb2.TOOL_MODE_REQUIRED
        is_called = is_required and self._manner.ignored != "strict_tools"
        if self._manner.wrong is Wrong.CALLS_UNASKED:
            is_called |= options.mode == tools_pb2.TOOL_MODE_NONE
        if not is_called:
            return None
        others = [tool for tool in options.tools if tool.name != options.required_tool]
        if self._manner.wrong is Wrong.OTHER_TOOL and others:
            return others[0]
        wanted = [tool for tool in options.tools if tool.name == options.required_tool]
        return (wanted or list(options.tools))[0]

    def _call(self, tool: tools_pb2.Tool) -> list[int]:
        arguments = request_text.instance_text(tool.parameters_json_schema, self._seed)
        if self._manner.wrong is Wrong.ARGUMENTS_INVALID:
            arguments = json.dumps({"city": "Bonn", "days": 1})
        return [CALL, *encode(arguments), CALLED]

    def _forced(self, ids: list[int]) -> Said:
        rows = [log_softmax(self._logits(position)) for position in range(len(ids))]
        return Said(ids=ids, rows=rows, reason=generation_pb2.FINISH_REASON_END)

    def _think(self) -> int:
        for position in range(_THOUGHTS + 2):
            self._rows.append(log_softmax(self._logits(position)))
            token = {0: THINK, _THOUGHTS + 1: THOUGHT}.get(position)
            drawn = int(np.argmax(self._logits(position)))
            self._ids.append(drawn if token is None else token)
        return len(self._ids)

    def _free(self) -> Said:
        stop = self._spec.stop
        reason = generation_pb2.FINISH_REASON_MAX_TOKENS
        while len(self._ids) < stop.max_output_tokens:
            logits = self._logits(len(self._ids))
            token = self._draw(logits)
            if token == EOS:
                reason = generation_pb2.FINISH_REASON_END
                break
            is_stop = token in stop.stop_token_ids
            if is_stop and self._manner.wrong is not Wrong.STOP_TOKEN_IGNORED:
                return self._stopped_by(token)
            self._rows.append(log_softmax(logits / self._late()))
            self._ids.append(token)
        return self._stopped(self._timed(Said(ids=self._ids, rows=self._rows, reason=reason)))

    def _stopped_by(self, token: int) -> Said:
        said = Said(ids=self._ids, rows=self._rows, reason=_STOPPED, stop_token=token)
        if self._manner.wrong is Wrong.STOP_TOKEN_SHOWN:
            said.ids.append(token)
            said.rows.append(self._logits(len(said.rows)))
        return said

    def _timed(self, said: Said) -> Said:
        """As if a token took a millisecond."""
        most = self._spec.max_duration.ToMilliseconds()
        if not most or len(said.ids) <= most:
            return said
        wrong = self._manner.wrong
        said.ids = said.ids[: 0 if wrong is Wrong.DURATION_EMPTY else most]
        said.reason = generation_pb2.FINISH_REASON_TIME_LIMIT
        if wrong is Wrong.DURATION_UNNAMED:
            said.reason = generation_pb2.FINISH_REASON_CONTEXT_FULL
        return said

    def _late(self) -> float:
        heat = self._spec.sampling.temperature
        return heat if heat and self._manner.wrong is Wrong.LOGPROBS_LATE else 1.0

    def _logits(self, position: int) -> Row:
        return logits_of(self._key, position)

    def _draw(self, logits: Row) -> int:
        sampling, stop = self._spec.sampling, self._spec.stop
        adapted = self._penalised(logits.copy())
        if self._manner.ignored != "logit_bias":
            for token, bias in sampling.logit_bias.items():
                adapted[token] += bias
        least = stop.min_output_tokens if self._manner.ignored != "min_output_tokens" else 0
        goes_on = stop.ignore_eos and self._manner.ignored != "ignore_eos"
        if goes_on or len(self._ids) < least:
            adapted[EOS] = -np.inf
        heat = sampling.temperature if sampling.HasField("temperature") else 1.0
        if not heat:
            return int(np.argmax(adapted))
        adapted = self._filtered(adapted / heat)
        if self._manner.ignored != "min_p" and sampling.min_p:
            adapted[adapted < adapted.max() + np.log(sampling.min_p)] = -np.inf
        return int(np.argmax(adapted + _noise(self._seed, len(self._ids))))

    def _filtered(self, logits: Row) -> Row:
        """Only the likeliest, where one of the two filters leaves no other."""
        sampling, wrong = self._spec.sampling, self._manner.wrong
        is_best = sampling.top_k == 1 and wrong is not Wrong.TOP_K_IGNORED
        is_best |= 0 < sampling.top_p < 1e-3 and wrong is not Wrong.TOP_P_IGNORED
        if is_best:
            logits[logits < logits.max()] = -np.inf
        return logits

    def _penalised(self, logits: Row) -> Row:
        sampling = self._spec.sampling
        counts = Counter(self._ids)
        if self._manner.ignored != "penalties":
            for token, count in counts.items():
                logits[token] -= sampling.frequency_penalty * count
                if self._manner.wrong is not Wrong.PRESENCE_IGNORED:
                    logits[token] -= sampling.presence_penalty
        if sampling.HasField("repetition_penalty") and self._manner.ignored != "repetition_penalty":
            for token in {*counts, *self._prompt} & set(request_text.words()):
                factor = sampling.repetition_penalty
                logits[token] *= factor if logits[token] < 0 else 1 / factor
        return logits

    def _stopped(self, said: Said) -> Said:
        text, _ = request_text.decode(said.ids)
        places = [(text.find(stop), stop) for stop in self._spec.stop.stop_sequences]
        found = [place for place in places if place[0] >= 0]
        if not found:
            return said
        wrong = self._manner.wrong
        at, stop = min(found)
        is_kept = self._spec.stop.include_stop and wrong is not Wrong.STOP_CUT
        said.limit = at + len(stop) if is_kept else at
        # A token counts when something of it is shown.
        counted = at if wrong is Wrong.STOP_UNCOUNTED else said.limit
        ends = np.cumsum([len(bytes_of(token)) for token in said.ids])
        said.ids = said.ids[: int(np.searchsorted(ends, counted)) + 1]
        said.stop = "" if wrong is Wrong.STOP_UNNAMED else stop
        said.reason = _STOPPED
        return said


@lru_cache(maxsize=8192)
def logits_of(key: bytes, position: int) -> Row:
    """Logits of a position: words, and the end, which becomes likelier."""
    seed = hashlib.blake2b(key + position.to_bytes(4, "little"), digest_size=8).digest()
    logits = np.random.default_rng(int.from_bytes(seed, "little")).normal(0, 1.5, SIZE)
    logits[: request_text.words()[0]] = _NEVER
    logits[EOS] = 0.1 * position - 8
    logits.flags.writeable = False
    return logits


@lru_cache(maxsize=8192)
def _noise(seed: int, position: int) -> Row:
    return np.random.default_rng([seed % 2**63, position]).gumbel(size=SIZE)


def log_softmax(logits: Row) -> Row:
    """Natural logarithms of the probabilities."""
    lowered = logits - logits.max()
    return np.asarray(lowered - np.log(np.exp(lowered).sum()))


class Deltas:
    """Cuts one output into deltas, one for each token of which something is shown."""

    def __init__(self, index: int, said: Said, spec: Spec, manner: Manner, call_id: str) -> None:
        self._index = index
        self._said = said
        self._spec = spec
        self._manner = manner
        self._call_id = call_id
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._begun = False

    def cut(self, *, is_streamed: bool) -> list[generation_pb2.OutputDelta]:
        """The deltas, the last of which ends the output."""
        said = self._said
        made: list[generation_pb2.OutputDelta] = []
        first = 0
        for place, token in enumerate(said.ids):
            delta = generation_pb2.OutputDelta(index=self._index)
            self._show(delta, place, token, is_streamed=is_streamed)
            if delta.WhichOneof("content") is not None:
                self._account(delta, first, place + 1, is_streamed=is_streamed)
                made.append(delta)
                first = place + 1
        last = generation_pb2.OutputDelta(
            index=self._index, end=generation_pb2.OutputEnd(reason=said.reason)
        )
        if said.stop:
            last.end.stop_sequence = said.stop
        if said.stop_token is not None:
            last.end.stop_token_id = said.stop_token
        self._account(last, first, len(said.ids), is_streamed=is_streamed)
        made.append(last)
        if self._manner.wrong is Wrong.SCORES_LATE and is_streamed:
            for delta, later in reversed([*itertools.pairwise(made)]):
                later.scores.CopyFrom(delta.scores)
        if said.call:
            return self._broken(made, is_streamed=is_streamed)
        return made

    def _broken(
        self, made: list[generation_pb2.OutputDelta], *, is_streamed: bool
    ) -> list[generation_pb2.OutputDelta]:
        wrong = self._manner.wrong
        if wrong is Wrong.FRAGMENTS_LOST and is_streamed:
            made[3].tool_call.arguments_json = ""
        if wrong is Wrong.FRAGMENTS_MIXED and is_streamed:
            first, third = made[1].tool_call, made[3].tool_call
            first.arguments_json, third.arguments_json = third.arguments_json, first.arguments_json
        if wrong is Wrong.FRAGMENTS_WHOLE:
            whole = generation_pb2.OutputDelta(index=self._index, tool_call=made[0].tool_call)
            for delta in made:
                whole.token_ids.extend(delta.token_ids)
            whole.tool_call.arguments_json = "".join(
                delta.tool_call.arguments_json for delta in made
            )
            whole.end.CopyFrom(made[-1].end)
            return [whole]
        return made

    def _show(
        self, delta: generation_pb2.OutputDelta, place: int, token: int, *, is_streamed: bool
    ) -> None:
        said, wrong = self._said, self._manner.wrong
        if place == said.thoughts:
            self._text = ""
        before = len(self._text)
        self._text += self._decoder.decode(bytes_of(token))
        text = self._text[before : said.limit]
        if token == THOUGHT and wrong is Wrong.MARK_SHOWN:
            text = request_text.CONTROLS[THOUGHT]
        if not text:
            return
        if said.call:
            delta.tool_call.arguments_json = text
            if wrong is Wrong.FRAGMENT_NUMBER and self._begun and is_streamed:
                delta.tool_call.call_index = 1
            if wrong is Wrong.FRAGMENT_NAMED and is_streamed:
                self._begun = False
            if not self._begun:
                delta.tool_call.id, delta.tool_call.name = self._call_id, said.call
                self._begun = True
        elif place < said.thoughts and not (wrong is Wrong.REASONING_STREAMED and is_streamed):
            wanted = self._spec.output
            if wanted.return_reasoning or not wanted.HasField("return_reasoning"):
                delta.reasoning = text
        else:
            delta.text = text

    def _account(
        self, delta: generation_pb2.OutputDelta, first: int, last: int, *, is_streamed: bool
    ) -> None:
        """Adds ids and scores of the tokens of a delta."""
        delta.token_ids.extend(self._said.ids[first:last])
        wanted = self._spec.output
        has_scores = wanted.return_logprobs or wanted.return_token_bytes
        is_left_out = is_streamed and self._manner.wrong is Wrong.SCORES_UNSTREAMED
        if has_scores and first < last and not is_left_out:
            for place in range(first, last):
                self._score(delta.scores, place)

    def _score(self, scores: scores_pb2.TokenScores, place: int) -> None:
        said, wanted, wrong = self._said, self._spec.output, self._manner.wrong
        token = said.ids[place]
        scores.token_ids.append(token)
        if wanted.return_logprobs and self._manner.ignored != "logprobs":
            row = said.rows[max(place - 1, 0) if wrong is Wrong.LOGPROBS_SHIFTED else place]
            scores.logprobs.append(row[token])
        is_last = place == len(said.ids) - 1
        add_top(scores, said.rows[place], wanted.top_logprobs, self._manner, is_last=is_last)
        if wanted.return_token_bytes:
            shown = bytes_of(token)
            scores.token_bytes.append(shown.lstrip() if wrong is Wrong.BYTES_OFF else shown)


def add_top(
    scores: scores_pb2.TokenScores, row: Row | None, count: int, manner: Manner, *, is_last: bool
) -> None:
    """Adds the alternatives of a row; None for one that has none."""
    if manner.ignored == "max_top_logprobs":
        return
    if manner.wrong is Wrong.TOP_MISSING and is_last:
        return
    scores.top_count = count
    if row is None:
        scores.top_token_ids.extend([_PADDING] * count)
        scores.top_logprobs.extend([-np.inf] * count)
        return
    best = np.argsort(-row, kind="stable")[:count]
    if manner.wrong is Wrong.ALTERNATIVES_UNSORTED and count > 2:
        best = best[[0, *range(count - 1, 0, -1)]]
    scores.top_token_ids.extend(int(token) for token in best)
    scores.top_logprobs.extend(float(row[token]) for token in best)


def whole(deltas: Sequence[generation_pb2.OutputDelta]) -> generation_pb2.Output:
    """An output that is not streamed."""
    output = generation_pb2.Output(index=deltas[0].index, end=deltas[-1].end)
    for delta in deltas:
        output.text += delta.text
        output.reasoning += delta.reasoning
        if delta.HasField("tool_call"):
            if delta.tool_call.id:
                output.tool_calls.add(id=delta.tool_call.id, name=delta.tool_call.name)
            output.tool_calls[-1].arguments_json += delta.tool_call.arguments_json
        output.token_ids.extend(delta.token_ids)
        output.scores.MergeFrom(delta.scores)
    return output
