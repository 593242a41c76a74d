"""What the simulator says under a constraint: of all that is allowed, what ends soon.

It knows no grammar, only which tokens may come next, so it goes by their first characters:

    JSON            words or one-digit numbers for values, two entries or so, then whatever closes
    anything else   by chance, at first; then the kinds of characters that came least often, closing
                    ones first
    everything      ends where it may

An output of a schema takes some tens of tokens, whatever the schema allows besides. The choice is a
function of (prompt, seed, output so far).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from services.worker.engine.base import ConstraintKind
from services.worker.engine.matcher import Mask, Matcher
from services.worker.engine.sim_output import INSIDE, OPENING, SimOutput, mix
from services.worker.engine.sim_tokenizer import SimTokenizer

Ids = npt.NDArray[np.int64]

# Tokens after which it only closes what is open.
BUDGET_TOKENS = 32
# Nested deeper, it opens nothing that it need not.
DEPTH_MAX = 3

_JSON_KINDS = frozenset(
    {ConstraintKind.JSON_OBJECT, ConstraintKind.JSON_SCHEMA, ConstraintKind.TOOLS}
)
_QUOTE, _BACKSLASH, _COMMA = b'"\\,'
_WHITE = frozenset(b" \t\n\r")
_DIGITS = frozenset(b"0123456789")
_OPENERS = frozenset(b"{[")
_CLOSERS = frozenset(b"}]")
# What ends soonest first.
_VALUES = b'123456789tfn"0-[{'
# Outside of JSON.
_CLOSING = frozenset(b")]}>")
_OPENING = frozenset(b"([{<\"'`")
_PARTNERS = dict(zip(b"([{<\"'`", b")]}>\"'`", strict=True))
# Where so many kinds of characters may come, it is text.
_TEXT_KINDS_MIN = 16
_ASCII_END = 128
_LETTERS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_KIND_OF_LETTERS, _KIND_OF_DIGITS, _KIND_OF_OTHERS = 256, 257, 258


class Choices:
    """The tables of one vocabulary."""

    def __init__(self, tokenizer: SimTokenizer, output: SimOutput) -> None:
        self.pieces = [
            tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocabulary_size)
        ]
        self.ends = np.array(tokenizer.end_ids, dtype=np.int64)
        self.first_bytes = np.array([piece[0] if piece else 0 for piece in self.pieces])
        self.inside = output.words(INSIDE)
        self.opening = output.words(OPENING)
        kinds = [_kind_of(byte) for byte in range(256)]
        self.kinds = np.array(kinds)[self.first_bytes]


def _kind_of(byte: int) -> int:
    if byte in _LETTERS:
        return _KIND_OF_LETTERS
    if byte in _DIGITS:
        return _KIND_OF_DIGITS
    return byte if byte < _ASCII_END else _KIND_OF_OTHERS


class _Json:
    """Where in a JSON text an output is.

    Attributes:
        is_string: inside a string.
        string_tokens: tokens of that string so far.
        entries: commas in each open object or array, outermost first.
        number_digits: digits of the number that the text ends with.
        last: byte; 0 at the beginning.
    """

    def __init__(self) -> None:
        self.is_string = False
        self.string_tokens = 0
        self.entries: list[int] = []
        self.number_digits = 0
        self.last = 0
        self._is_escaped = False

    def take(self, piece: bytes) -> None:
        """Reads the next token."""
        if self.is_string:
            self.string_tokens += 1
        for byte in piece:
            if self.is_string:
                self._take_inside(byte)
            else:
                self._take_outside(byte)
            self.last = byte

    def _take_inside(self, byte: int) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif byte == _BACKSLASH:
            self._is_escaped = True
        elif byte == _QUOTE:
            self.is_string = False

    def _take_outside(self, byte: int) -> None:
        self.number_digits = self.number_digits + 1 if byte in _DIGITS else 0
        if byte == _QUOTE:
            self.is_string = True
            self.string_tokens = 0
        elif byte in _OPENERS:
            self.entries.append(0)
        elif byte in _CLOSERS and self.entries:
            self.entries.pop()
        elif byte == _COMMA and self.entries:
            self.entries[-1] += 1


class Chooser:
    """The choices of one output."""

    def __init__(self, choices: Choices, kind: ConstraintKind, base: int, most: int) -> None:
        """Starts at the beginning of an output.

        Args:
            choices: of the vocabulary.
            kind: of the constraint.
            base: 64 bits of prompt and seed.
            most: output tokens that there may be.
        """
        self._choices = choices
        self._kind = kind
        self._base = base
        self._budget = min(BUDGET_TOKENS, most // 3)
        self._json = _Json()
        self._tokens = 0
        self._answer_at = 0
        self._kinds_said: Counter[int] = Counter()
        # Words since anything else; the quote or bracket that came last.
        self._words = 0
        self._opener = 0

    def take(self, token_id: int) -> None:
        """Hears what was said."""
        self._tokens += 1
        self._json.take(self._choices.pieces[token_id])
        kind = int(self._choices.kinds[token_id])
        self._kinds_said[kind] += 1
        # A token of a word begins with a space or a letter.
        is_word = kind == _KIND_OF_LETTERS or len(self._choices.pieces[token_id]) > 1
        self._words = self._words + 1 if is_word else 0
        if kind in _PARTNERS:
            self._opener = kind

    def begin_answer(self) -> None:
        """Hears that thoughts are over: what was said so far does not count."""
        self._answer_at = self._tokens

    def choose(self, mask: Mask, *, may_end: bool) -> int | None:
        """Picks one of the tokens that may come.

        Args:
            mask: at least one is allowed.
            may_end: whether it may end where the mask lets it.

        Returns:
            a token; None to end.
        """
        ends = self._choices.ends
        allowed = np.flatnonzero(mask)
        can_end = bool(mask[ends[0]])
        if can_end:
            allowed = allowed[~np.isin(allowed, ends)]
        if not allowed.size or (can_end and may_end and self._wants_end()):
            return None
        if allowed.size == 1:
            return int(allowed[0])
        if self._kind not in _JSON_KINDS:
            return self._among_kinds(mask, allowed)
        if self._json.is_string:
            return self._string(mask, allowed)
        if self._kind is ConstraintKind.TOOLS and can_end and not self._json.entries:
            word = self._word(mask)
            return word if word is not None else self._among_kinds(mask, allowed)
        return self._structure(allowed)

    @property
    def _is_closing(self) -> bool:
        return self._tokens - self._answer_at >= self._budget

    def _chance(self, below: int) -> int:
        """A number of this place, 0..below - 1."""
        return (mix(self._base, self._tokens) >> 20) % below

    def _wants_end(self) -> bool:
        """Free text beside tools goes on for a few words; all else ends where it may."""
        is_text = self._kind is ConstraintKind.TOOLS and not self._kinds_said[ord("{")]
        return not is_text or self._tokens - self._answer_at >= min(8, self._budget)

    def _word(self, mask: Mask) -> int | None:
        words = self._choices.inside if self._words else self._choices.opening
        word = words[self._chance(256)]
        return word if mask[word] else None

    def _string(self, mask: Mask, allowed: Ids) -> int:
        """One to three words; then, or when no word fits, the quote."""
        if mask[_QUOTE]:
            enough = 1 + self._chance(3)
            if self._is_closing or self._json.string_tokens >= enough:
                return _QUOTE
            word = self._word(mask)
            if word is not None or self._json.string_tokens:
                return _QUOTE if word is None else word
        word = self._word(mask)
        if word is not None:
            return word
        escapes = self._choices.first_bytes[allowed] == _BACKSLASH
        return self._letters(allowed[~escapes] if not escapes.all() else allowed)

    def _letters(self, allowed: Ids) -> int:
        return int(allowed[self._chance(len(allowed))])

    def _structure(self, allowed: Ids) -> int:
        firsts = self._choices.first_bytes[allowed]
        seen = {int(byte) for byte in np.unique(firsts)}
        wanted = self._wanted(seen - _WHITE or seen)
        fitting = allowed[np.isin(firsts, list(wanted))]
        return int(fitting[self._chance(len(fitting))])

    def _wanted(self, seen: set[int]) -> set[int]:
        """Narrows first bytes down, outside of strings."""
        if self._json.number_digits:
            digits = seen & (_DIGITS | frozenset(b".eE"))
            if seen - digits:
                seen = seen - digits
            elif digits & _DIGITS:
                return digits & _DIGITS
        closers = seen & _CLOSERS
        if closers and len(seen) > len(closers):
            return closers if self._closes_now() else seen - closers
        if closers:
            return closers
        return {self._value(seen)} if self._is_closing else self._easy(seen)

    def _closes_now(self) -> bool:
        entries = self._json.entries
        if self._is_closing or len(entries) > DEPTH_MAX:
            return True
        is_empty = self._json.last in _OPENERS
        return not is_empty and bool(entries) and entries[-1] >= self._chance(3)

    def _easy(self, seen: set[int]) -> set[int]:
        """Any value, but nothing nested without need when it is deep already."""
        if len(self._json.entries) >= DEPTH_MAX:
            seen = seen - _OPENERS or seen
        picked = sorted(seen)[self._chance(len(seen))]
        # All digits would outweigh what else a value may be; a minus says nothing.
        return {picked} if picked != ord("-") else seen - {picked} or seen

    def _value(self, seen: set[int]) -> int:
        return next((byte for byte in _VALUES if byte in seen), min(seen))

    def _among_kinds(self, mask: Mask, allowed: Ids) -> int:
        """A kind of character, then one of its tokens."""
        kinds = self._choices.kinds[allowed]
        seen: list[int] = np.unique(kinds).tolist()
        if len(seen) >= _TEXT_KINDS_MIN and _KIND_OF_LETTERS in seen:
            token_id = self._text(mask, seen)
            if token_id is not None:
                return token_id
        if self._is_closing:
            kind = min(seen, key=self._reluctance)
        else:
            kind = seen[self._chance(len(seen))]
        fitting = allowed[kinds == kind]
        return int(fitting[self._chance(len(fitting))])

    def _text(self, mask: Mask, seen: list[int]) -> int | None:
        """Where nearly anything may come: words, then what closes the quote or the bracket."""
        if self._words >= 1 + self._chance(3) or self._is_closing:
            closing = _PARTNERS.get(self._opener)
            return closing if closing in seen else None
        return self._word(mask)

    def _reluctance(self, kind: int) -> tuple[int, int]:
        """What closes comes first, what opens last.

        Others that came often wait, so that what leaves a loop gets its turn.
        """
        if kind in _CLOSING:
            return 0, 0
        if kind in _OPENING:
            return self._kinds_said[kind], 3
        is_word = kind in (_KIND_OF_LETTERS, _KIND_OF_DIGITS)
        return self._kinds_said[kind] // 8, 1 if is_word else 2


def choice_of(texts: Sequence[str], base: int) -> bytes:
    """Returns which of some texts an output says: any of them, by chance."""
    return texts[mix(base, 0) % len(texts)].encode()


def write(
    matcher: Matcher, choices: Choices, kind: ConstraintKind, *, base: int, most: int
) -> bytes | None:
    """Writes a whole output.

    Returns:
        its UTF-8; None when it takes more than `most` tokens.

    Raises:
        MatcherError: a step is too large.
    """
    chooser = Chooser(choices, kind, base, most)
    said: list[bytes] = []
    for _ in range(most):
        token_id = chooser.choose(matcher.mask(), may_end=True)
        if token_id is None:
            return b"".join(said)
        matcher.accept(token_id)
        chooser.take(token_id)
        said.append(choices.pieces[token_id])
    return None
