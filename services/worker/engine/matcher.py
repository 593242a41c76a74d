"""Which tokens may come next under a constraint: llguidance over the vocabulary of one model.

Engines that enforce constraints by themselves, token by token, share this. Everything is bounded:
grammars that are too large, and steps that would take too long, end in a MatcherError. So does an
output whose steps take too much processor time: of an ambiguous grammar (`x ::= x x | "a"`) each
step takes longer than the one before, and all lanes of the engine wait for it. What is common takes
less than a tenth of the bound.

    allowed = matcher.mask()        before each token
    matcher.accept(token_id)        after it
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

Mask = npt.NDArray[np.bool_]

# Compiled grammars that are kept: the outputs of one request have the same one, and so have the
# requests of one program.
COMPILED_MAX = 16
# Processor time of the steps of one output: so much in advance, and so much more with each step.
AHEAD_CPU_S = 0.5
STEP_CPU_S = 0.025
# What llguidance takes for a special token and never for text.
_SPECIAL = b"\xff"


class MatcherError(Exception):
    """A grammar cannot be used, or a token is not allowed. The message holds no text of either."""


class _Vocabulary:
    """A vocabulary as llguidance asks for it.

    Attributes:
        eos_token_id: the first of the ids that end an output.
        bos_token_id: none; outputs begin with text.
        tokens: bytes of each token; control tokens are marked as special.
        special_token_ids: ids of the control tokens.
    """

    def __init__(self, tokens: Sequence[bytes], eos_token_id: int, specials: Sequence[int]) -> None:
        self.eos_token_id = eos_token_id
        self.bos_token_id: int | None = None
        self.tokens = tokens
        self.special_token_ids = specials
        self.greedy: LLTokenizer | None = None

    def __call__(self, text: bytes) -> list[int]:
        """Spells a text that the grammar forces, in the longest tokens that fit."""
        # llguidance tries it once before there is a vocabulary.
        return self.greedy.greedy_tokenize(text.decode()) if self.greedy is not None else []


class MatcherFactory:
    """Makes matchers for one vocabulary. Belongs to one thread at a time."""

    def __init__(
        self, pieces: Sequence[bytes], *, end_ids: Sequence[int], control_ids: Collection[int]
    ) -> None:
        """Reads the vocabulary: 10 ms for 5,000 tokens.

        Args:
            pieces: bytes of each token.
            end_ids: tokens that end an output; at least one.
            control_ids: tokens that are no text. Those of end_ids need not be among them.
        """
        specials = sorted({*control_ids, *end_ids})
        is_special = set(specials)
        tokens = [
            _SPECIAL + f"<[{token_id}]>".encode() if token_id in is_special else piece
            for token_id, piece in enumerate(pieces)
        ]
        vocabulary = _Vocabulary(tokens, end_ids[0], specials)
        wrapper = TokenizerWrapper(vocabulary)
        ends = list(end_ids)
        # The first one only spells; the second one, which asks it, matches.
        vocabulary.greedy = LLTokenizer(wrapper, n_vocab=len(tokens), eos_token=ends, slices=[])
        self._tokenizer = LLTokenizer(wrapper, n_vocab=len(tokens), eos_token=ends)
        self._size = len(tokens)
        self._specials = np.array(specials, dtype=np.int64)
        self._ends = np.array(ends, dtype=np.int64)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def make(self, grammar: str) -> Matcher:
        """Compiles a grammar. 1 ms for a small one, hundreds for the largest that is taken.

        Args:
            grammar: as llguidance reads it.

        Raises:
            MatcherError: it is malformed, or larger than the limits.
        """
        compiled = self._compiled.pop(grammar, None)
        if compiled is None:
            compiled = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_limits())
            if compiled.is_error():
                raise MatcherError("the constraint's grammar is malformed or too large")
        self._compiled[grammar] = compiled
        if len(self._compiled) > COMPILED_MAX:
            self._compiled.popitem(last=False)
        return Matcher(compiled.deep_copy(), self._size, self._specials, self._ends)


class Matcher:
    """One output under a constraint. Belongs to one thread at a time."""

    def __init__(
        self,
        matcher: LLMatcher,
        size: int,
        specials: npt.NDArray[np.int64],
        ends: npt.NDArray[np.int64],
    ) -> None:
        self._matcher = matcher
        self._size = size
        self._specials = specials
        self._ends = ends
        self._bits = allocate_token_bitmask(1, size)
        self._cpu_left_s = AHEAD_CPU_S

    def mask(self) -> Mask:
        """Says which tokens may come next. 5 us to 100 us for small vocabularies.

        Returns:
            shape (vocabulary,). The tokens that end an output are True where it may end; other
            control tokens never are. At least one is True.

        Raises:
            MatcherError: the step is too large, or nothing in the vocabulary fits.
        """
        started_s = time.thread_time()
        fill_next_token_bitmask(self._matcher, self._bits)
        self._spend(started_s)
        self._check()
        bits = np.unpackbits(self._bits.view(np.uint8)[0], bitorder="little", count=self._size)
        allowed: Mask = bits.view(np.bool_)
        allowed[self._specials] = False
        allowed[self._ends] = self._matcher.is_accepting()
        if not allowed.any():
            raise MatcherError("no token of the vocabulary fits the constraint")
        return allowed

    def accept(self, token_id: int) -> None:
        """Takes the next token.

        Raises:
            MatcherError: it is not allowed here.
        """
        self._cpu_left_s = min(AHEAD_CPU_S, self._cpu_left_s + STEP_CPU_S)
        started_s = time.thread_time()
        if not self._matcher.consume_token(token_id):
            raise MatcherError(f"token {token_id} does not fit the constraint")
        self._spend(started_s)
        self._check()

    @property
    def is_over(self) -> bool:
        """Nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def _spend(self, started_s: float) -> None:
        self._cpu_left_s -= time.thread_time() - started_s
        if self._cpu_left_s < 0:
            raise MatcherError("the constraint takes too much time")

    def _check(self) -> None:
        if self._matcher.is_error():
            raise MatcherError("the constraint takes too many steps")


def _limits() -> LLParserLimits:
    """Bounds of memory and time; the fuels are llguidance's own units, about 20,000 in a ms."""
    return LLParserLimits(
        max_items_in_row=2_000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        # A grammar of single characters makes some for each token of the vocabulary.
        step_max_items=500_000,
        max_lexer_states=50_000,
        max_grammar_size=500_000,
        # Messages must not show what a tenant wrote.
        verbose_errors=False,
    )
