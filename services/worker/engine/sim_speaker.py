"""One output of the simulator, token by token, where a request asks for more than plain text.

Plain outputs, with or without log-probabilities, are looked up in columns (sim_columns.py) and
never come here.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter

import numpy as np

from services.worker.engine.base import EngineRequest, Lane, PromptScores, Sampling
from services.worker.engine.matcher import Mask, Matcher, MatcherFactory
from services.worker.engine.sim_choice import Choices, Chooser
from services.worker.engine.sim_model import SCRIPT_LIFT, Place, SimModel, changes_logits
from services.worker.engine.sim_output import SimOutput, base_of, end_of, model_base_of, share_of
from services.worker.engine.sim_script import Script, Scripts
from services.worker.engine.sim_tokenizer import SimTokenizer

_PIECE_MAX = 24
# Of a prompt, in one part of its log-probabilities.
_PART_TOKENS = 512
# A model that never ends by itself can still be made to, by a bias of its end tokens.
_NEVER = 1e-11
_ALWAYS = 1 - 1e-9


def is_plain(sampling: Sampling) -> bool:
    """Whether tokens come straight from the table."""
    if changes_logits(sampling) or sampling.temperature == 0:
        return not changes_logits(sampling)
    return (
        sampling.temperature == 1
        and sampling.top_p == 1
        and not sampling.top_k
        and not sampling.min_p
    )


class Voice:
    """What all outputs of one simulator have in common."""

    def __init__(self, tokenizer: SimTokenizer, output: SimOutput, mean_tokens: int) -> None:
        """Makes the tables: 20 ms.

        Args:
            tokenizer: of the vocabulary.
            output: the plain text.
            mean_tokens: mean length at which the model ends by itself; 0 means never.
        """
        self.output = output
        self.mean_tokens = mean_tokens
        self.model = SimModel(tokenizer, output)
        self.choices = Choices(tokenizer, output)
        self.scripts = Scripts(tokenizer, output, self.choices)
        self.end_ids = frozenset(tokenizer.end_ids)
        self.id_of = {piece: at for at, piece in enumerate(self.choices.pieces) if piece}
        self._tokenizer = tokenizer
        self._factory: MatcherFactory | None = None

    def is_slow_to_make(self, request: EngineRequest) -> bool:
        """Whether making its speaker compiles grammars: milliseconds, off the event loop."""
        return request.constraint is not None or self.scripts.has_functions(request)

    def needs_speaker(self, request: EngineRequest) -> bool:
        """Whether a request, slow to make or not, asks for more than plain text."""
        return not is_plain(request.sampling) or self.scripts.is_thinking(request)

    def speaker(self, request: EngineRequest, *, is_slow: bool) -> Speaker:
        """Makes what says an output, behind what was said of it elsewhere.

        Args:
            request: any.
            is_slow: as `is_slow_to_make` says; then only in one thread, whichever.

        Raises:
            MatcherError: the constraint cannot be used, or the output so far breaks it.
        """
        factory = self._matchers() if is_slow else None
        script = self.scripts.make(request, base_of(request), factory)
        matcher = None
        if request.constraint is not None and factory is not None:
            matcher = factory.make(request.constraint.grammar)
        return Speaker(self, request, script, matcher)

    def prompt_scores(self, lane: Lane, request: EngineRequest) -> list[PromptScores]:
        """Scores a whole prompt, in parts."""
        adapter = request.adapter.digest if request.adapter is not None else ""
        base = int.from_bytes(hashlib.blake2b(adapter.encode(), digest_size=8).digest(), "little")
        whole = len(request.prompt_ids)
        return [
            PromptScores(
                lane,
                start,
                self.model.prompt_scores(
                    request.prompt_ids,
                    start,
                    min(start + _PART_TOKENS, whole),
                    request.top_logprobs or 0,
                    base,
                ),
            )
            for start in range(0, whole, _PART_TOKENS)
        ]

    def _matchers(self) -> MatcherFactory:
        if self._factory is None:
            self._factory = MatcherFactory(
                self.choices.pieces,
                end_ids=self._tokenizer.end_ids,
                control_ids=self._tokenizer.control_ids,
            )
        return self._factory


class Speaker:
    """One output.

    Attributes:
        position: of the token that comes, 0-based.
        place: of the token that was said last.
    """

    def __init__(
        self, voice: Voice, request: EngineRequest, script: Script, matcher: Matcher | None
    ) -> None:
        """Starts behind request.continue_ids.

        Raises:
            MatcherError: they break the constraint.
        """
        self._voice = voice
        self._request = request
        self._base = base_of(request)
        self._model_base = model_base_of(request)
        self._is_plain = is_plain(request.sampling)
        self._ends_at = self._find_end()
        self._parts = list(script.parts)
        self._is_script_whole = script.is_whole
        self._is_script_said = False
        self._matcher = matcher
        self._chooser: Chooser | None = None
        if request.constraint is not None:
            self._chooser = Chooser(
                voice.choices, request.constraint.kind, self._base, request.max_output_tokens
            )
        self._said: Counter[int] = Counter()
        self._seen: Mask | None = None
        if request.sampling.repetition_penalty != 1:
            self._seen = np.zeros(len(voice.choices.pieces), dtype=np.bool_)
            self._seen[list(request.prompt_ids)] = True
        self._before: int | None = None
        # Tokens of the script: the plain text begins behind them.
        self._script_tokens = 0
        self.position = 0
        self.place = Place(0, 0)
        for token_id in request.continue_ids:
            if self._parts:
                # Drops what could not be begun there.
                self._script_token(matcher.mask() if matcher is not None else None)
            self._take(token_id)

    def say(self) -> int | None:
        """Says the next token.

        Returns:
            a token; None where the output ends by itself.

        Raises:
            MatcherError: the constraint's next step is too large.
        """
        mask = self._matcher.mask() if self._matcher is not None else None
        place = self._intend(mask)
        if place is None:
            return None
        token_id = place.likeliest
        if not self._is_plain:
            token_id = self._draw(place, mask)
        elif place.lift != SCRIPT_LIFT:
            token_id = self._voice.output.token(self._base, self._text_position)
            if self._request.sampling.temperature == 0:
                place = Place(place.row, token_id)
        self.place = place
        self._take(token_id)
        return token_id

    @property
    def is_over(self) -> bool:
        """Whether the constraint lets nothing but the end follow."""
        return self._matcher is not None and self._matcher.is_over

    @property
    def _text_position(self) -> int:
        return self.position - self._script_tokens

    @property
    def _may_end(self) -> bool:
        is_long = self.position >= self._request.min_output_tokens
        return is_long and not self._request.ignore_eos

    def _find_end(self) -> int | None:
        """Where the model ends by itself, minimum and script not counted; None for never."""
        mean = self._voice.mean_tokens
        biases = [
            bias
            for token_id, bias in self._request.sampling.logit_bias
            if token_id in self._voice.end_ids
        ]
        if not biases:
            return end_of(self._base, mean) if mean else None
        chance = min(1 / mean, _ALWAYS) if mean else _NEVER
        odds = chance / (1 - chance) * math.exp(max(biases))
        biased = min(odds / (1 + odds), _ALWAYS)
        if biased <= _NEVER:
            return None
        return int(math.log1p(-share_of(self._base)) / math.log1p(-biased))

    def _intend(self, mask: Mask | None) -> Place | None:
        """Finds out what the model would say: its place; None for the end."""
        before = self._before if self._text_position else None
        place = self._voice.model.place(self._model_base, self._text_position, before)
        scripted = self._script_token(mask) if self._parts else None
        if scripted is not None:
            return Place(place.row, scripted, SCRIPT_LIFT)
        if self._chooser is not None and mask is not None:
            chosen = self._chooser.choose(mask, may_end=self._may_end)
            return Place(place.row, chosen, SCRIPT_LIFT) if chosen is not None else None
        is_end = self._ends_at is not None and self._text_position >= self._ends_at
        return None if self._may_end and (is_end or self._is_script_said) else place

    def _script_token(self, mask: Mask | None) -> int | None:
        """The longest token that goes on with the script. Drops parts that cannot be said."""
        while self._parts:
            part = self._parts[0]
            for length in range(min(_PIECE_MAX, len(part)), 0, -1):
                token_id = self._voice.id_of.get(part[:length])
                if token_id is not None and (mask is None or mask[token_id]):
                    return token_id
            del self._parts[0]
        return None

    def _take(self, token_id: int) -> None:
        if self._matcher is not None:
            self._matcher.accept(token_id)
        if self._chooser is not None:
            self._chooser.take(token_id)
        if self._parts:
            self._follow(token_id)
        if not self._is_plain:
            self._said[token_id] += 1
            if self._seen is not None:
                self._seen[token_id] = True
        self._before = token_id
        self.position += 1

    def _follow(self, token_id: int) -> None:
        """Goes on in the script, or leaves it when something else was said."""
        piece = self._voice.choices.pieces[token_id]
        if not piece or not self._parts[0].startswith(piece):
            self._parts.clear()
            return
        self._script_tokens += 1
        self._parts[0] = self._parts[0][len(piece) :]
        if not self._parts[0]:
            del self._parts[0]
            self._is_script_said = self._is_script_whole and not self._parts
            if self._chooser is not None:
                self._chooser.begin_answer()

    def _draw(self, place: Place, mask: Mask | None) -> int:
        return self._voice.model.draw(
            place,
            self._request.sampling,
            base=self._base,
            position=self.position,
            said=self._said,
            seen=self._seen,
            mask=mask,
        )
