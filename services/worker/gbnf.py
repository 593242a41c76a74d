r"""GBNF, the grammars of llama.cpp, as Lark for llguidance. Pure; linear in the grammar.

A grammar is translated token by token, because the two languages differ in the spelling of names,
literals and character classes only. No rule becomes a terminal of Lark: those are matched greedily,
so that `[ \t\n]* "\n"` would never end, and small grammars can make huge ones.

Checked on the way: every rule that is referred to is there, some text matches the root, and
repetitions do not multiply to more than `REPEATS_MAX`.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict, deque
from dataclasses import dataclass, field

RULES_MAX = 2000
NESTING_MAX = 64
REPEATS_MAX = 20_000
# llguidance's time grows with the square of what may be left out, and of what follows each other.
ITEMS_MAX = 2000
THINGS_MAX = 6000

_TOKEN = re.compile(
    r"""(?P<space>[ \t]+|\#[^\r\n]*)|(?P<newline>\r\n|\r|\n)|(?P<define>::=)
    |(?P<name>[A-Za-z0-9_-]+)|(?P<literal>"(?:[^"\\\r\n]|\\.)*")|(?P<class>\[(?:[^\]\\]|\\.)*\])
    |(?P<repeat>[*+?]|\{[ ]*\d{0,7}[ ]*(?:,[ ]*\d{0,7}[ ]*)?\})|(?P<mark>[().|])""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(
    r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))|(.)", re.DOTALL
)
_SPECIAL = re.compile(r"[^A-Za-z0-9 ]")
_PLAIN_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "[": "[", "]": "]"}
_CODE_POINT_MAX = 0x10FFFF
_SURROGATES = range(0xD800, 0xE000)
_REPEATS = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class GrammarInvalid(Exception):
    """It is no GBNF, or one that is refused. The message quotes nothing but names of rules."""


@dataclass(slots=True)
class _Sequence:
    """Things that follow each other; one alternative of a rule or of a group.

    Attributes:
        owner: number of its rule or group.
        size: places in it, repetitions counted out.
        missing: things in it that may not be left out and of which no text is known yet.
        waits_for: what these are: rules by name, groups by number.
        item_size: of the last thing.
        item: the last thing, likewise; None for a literal or a class.
        items: how many there were.
    """

    owner: str | int
    size: int = 0
    missing: int = 0
    waits_for: list[str | int] = field(default_factory=list)
    item_size: int = 0
    item: str | int | None = None
    items: int = 0

    def add(self, item: str | int | None, size: int) -> None:
        self.close_item(1, 1)
        self.item, self.item_size = item, size
        self.items += 1
        if self.items > ITEMS_MAX:
            raise GrammarInvalid(f"more than {ITEMS_MAX} parts follow each other")

    def close_item(self, least: int, most: int) -> None:
        """Counts the last thing, which stands there so many times."""
        self.size += self.item_size * max(most, 1)
        if self.size > REPEATS_MAX:
            raise GrammarInvalid(f"repetitions multiply to more than {REPEATS_MAX}")
        if self.item is not None and least > 0:
            self.missing += 1
            self.waits_for.append(self.item)
        self.item, self.item_size = None, 0


@dataclass(slots=True)
class _Rule:
    """A rule in the making.

    Attributes:
        name: in GBNF.
        parts: Lark; names of other rules stand in it as they are, with `_REFERENCE` before them.
        references: other rules in it.
    """

    name: str
    parts: list[str] = field(default_factory=list)
    references: set[str] = field(default_factory=set)


_REFERENCE = "\0"


class _Reader:
    """Reads one grammar."""

    def __init__(self) -> None:
        self.rules: dict[str, _Rule] = {}
        self.sequences: list[_Sequence] = []
        self._stack: list[_Sequence] = []
        # Largest of the alternatives of each open rule or group.
        self._sizes: list[int] = []
        self._groups = 0
        # Terminals, references, groups, alternatives and repetitions.
        self._things = 0
        self._rule = _Rule("")

    def read(self, source: str) -> None:
        tokens = [token for token in _tokens(source) if token[0] != "space"]
        position = 0
        while position < len(tokens):
            kind, _ = tokens[position]
            if kind == "newline":
                position += 1
                continue
            position = self._read_rule(tokens, position)

    def _read_rule(self, tokens: list[tuple[str, str]], position: int) -> int:
        kind, name = tokens[position]
        if kind != "name" or position + 1 >= len(tokens) or tokens[position + 1][0] != "define":
            raise GrammarInvalid("a rule has to begin with its name and ::=")
        if name in self.rules:
            raise GrammarInvalid(f"rule {name[:64]} is there twice")
        if len(self.rules) == RULES_MAX:
            raise GrammarInvalid(f"more than {RULES_MAX} rules")
        self._rule = self.rules[name] = _Rule(name)
        self._open(name)
        may_break = True
        position += 2
        while position < len(tokens):
            kind, text = tokens[position]
            if kind == "newline":
                # A rule ends with its line, except in a group or behind "::=" and "|".
                if not may_break and len(self._stack) == 1:
                    break
            else:
                self._take(kind, text)
                may_break = text == "|" and kind == "mark"
            position += 1
        if len(self._stack) != 1:
            raise GrammarInvalid(f"a group of rule {name[:64]} is not closed")
        if not self._rule.parts:
            raise GrammarInvalid(f"rule {name[:64]} is empty")
        self._close()
        return position

    def _take(self, kind: str, text: str) -> None:
        self._things += 1
        if self._things > THINGS_MAX:
            raise GrammarInvalid(f"has more than {THINGS_MAX} parts")
        match kind:
            case "name":
                self._rule.references.add(text)
                self._add(_REFERENCE + text, text)
            case "literal":
                value = "".join(map(chr, _characters(text[1:-1])))
                self._add(lark_literal(value), None, max(len(value), 1))
            case "class":
                self._add(_class(text[1:-1]), None)
            case "repeat":
                self._repeat(text)
            case "mark":
                self._take_mark(text)
            case _:
                raise GrammarInvalid("::= does not stand behind the name of a rule")

    def _take_mark(self, text: str) -> None:
        if text == ".":
            self._add("/(?s:.)/", None)
        elif text == "(":
            self._groups += 1
            self._rule.parts.append("(")
            self._open(self._groups)
        elif text == "|":
            owner = self._end_sequence().owner
            self._rule.parts.append("|")
            self._stack.append(_Sequence(owner))
        else:
            if len(self._stack) == 1:
                raise GrammarInvalid("a group is closed that was not opened")
            group, size = self._close()
            self._rule.parts.append(")")
            self._stack[-1].add(group, size)

    def _add(self, part: str, item: str | None, size: int = 1) -> None:
        self._stack[-1].add(item, size)
        self._rule.parts.append(part)

    def _repeat(self, text: str) -> None:
        sequence = self._stack[-1]
        if not sequence.item_size:
            raise GrammarInvalid("a repetition has nothing to repeat, or repeats a repetition")
        least, most = _REPEATS.get(text) or _counts(text)
        if most is not None and most < max(least, 1):
            raise GrammarInvalid("a repetition ends below where it begins")
        sequence.close_item(least, most if most is not None else least)
        if text[0] == "{":
            text = f"{{{least},{'' if most is None else most}}}"
        self._rule.parts.append(text)

    def _open(self, owner: str | int) -> None:
        if len(self._stack) > NESTING_MAX:
            raise GrammarInvalid(f"groups are nested deeper than {NESTING_MAX}")
        self._stack.append(_Sequence(owner))
        self._sizes.append(0)

    def _end_sequence(self) -> _Sequence:
        sequence = self._stack.pop()
        sequence.close_item(1, 1)
        if not sequence.items:
            self._rule.parts.append('""')
        self.sequences.append(sequence)
        self._sizes[-1] = max(self._sizes[-1], sequence.size)
        return sequence

    def _close(self) -> tuple[str | int, int]:
        owner = self._end_sequence().owner
        return owner, max(self._sizes.pop(), 1)


def lark_literal(text: str) -> str:
    """Writes a text as a terminal of Lark that matches just it."""
    if text.isascii() and text.isprintable():
        return json.dumps(text)
    return f"/{_SPECIAL.sub(_escaped, text)}/"


def _escaped(found: re.Match[str]) -> str:
    return f"\\x{{{ord(found.group()):X}}}"


def to_lark(source: str) -> str:
    """Translates a grammar.

    Raises:
        GrammarInvalid: it is no GBNF, has no rule `root`, refers to a rule that is not there, no
            text matches it, or it is too large.
    """
    reader = _Reader()
    reader.read(source)
    rules = reader.rules
    if "root" not in rules:
        raise GrammarInvalid("there is no rule root")
    for rule in rules.values():
        for name in rule.references:
            if name not in rules:
                raise GrammarInvalid(f"rule {name[:64]} is not there")
    if "root" not in _with_texts(reader.sequences):
        raise GrammarInvalid("no text matches rule root")
    names = {name: "start" if name == "root" else f"r{number}" for number, name in enumerate(rules)}
    lines = ["%llguidance {}"]
    for name, rule in rules.items():
        lines.append(f"{names[name]}:{''.join(_written(part, names) for part in rule.parts)}")
    return "\n".join(lines) + "\n"


def _written(part: str, names: dict[str, str]) -> str:
    if part[0] in "*+?{":
        return part
    return f" {names[part[1:]] if part[0] == _REFERENCE else part}"


def _with_texts(sequences: list[_Sequence]) -> set[str | int]:
    """Returns the rules and groups that some text matches."""
    waiting: defaultdict[str | int, list[_Sequence]] = defaultdict(list)
    for sequence in sequences:
        for item in sequence.waits_for:
            waiting[item].append(sequence)
    found: set[str | int] = set()
    ready = deque(sequence.owner for sequence in sequences if sequence.missing == 0)
    while ready:
        owner = ready.popleft()
        if owner in found:
            continue
        found.add(owner)
        for sequence in waiting[owner]:
            sequence.missing -= 1
            if sequence.missing == 0:
                ready.append(sequence.owner)
    return found


def _tokens(source: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    position = 0
    while position < len(source):
        found = _TOKEN.match(source, position)
        if found is None or found.lastgroup is None:
            line = source.count("\n", 0, position) + 1
            raise GrammarInvalid(f"line {line} is no GBNF")
        tokens.append((found.lastgroup, found.group()))
        position = found.end()
    return tokens


def _counts(text: str) -> tuple[int, int | None]:
    least, comma, most = text[1:-1].replace(" ", "").partition(",")
    if not comma:
        if not least:
            raise GrammarInvalid("a repetition has no count")
        return int(least), int(least)
    return int(least or 0), int(most) if most else None


def _characters(text: str) -> list[int]:
    """Returns the code points of a literal or a class."""
    return [_code_point(found) for found in _ESCAPE.finditer(text)]


def _code_point(found: re.Match[str]) -> int:
    *digits, escaped, plain = found.groups()
    for digits_of_kind in digits:
        if digits_of_kind is not None:
            value = int(digits_of_kind, 16)
            if value > _CODE_POINT_MAX or value in _SURROGATES:
                raise GrammarInvalid("an escape is no character")
            return value
    if escaped is None:
        return ord(plain)
    if escaped not in _PLAIN_ESCAPES:
        raise GrammarInvalid("an escape is not known")
    return ord(_PLAIN_ESCAPES[escaped])


def _class(text: str) -> str:
    """Returns a class of characters as a regular expression that has nothing to escape."""
    is_negated = text.startswith("^")
    found = list(_ESCAPE.finditer(text[is_negated:]))
    points = [_code_point(item) for item in found]
    ranges: list[str] = []
    position = 0
    while position < len(points):
        first = last = points[position]
        is_range = position + 2 < len(points) and found[position + 1].group() == "-"
        if is_range:
            last = points[position + 2]
        if last < first:
            raise GrammarInvalid("a range of characters ends below where it begins")
        ranges.append(f"\\x{{{first:X}}}-\\x{{{last:X}}}")
        position += 3 if is_range else 1
    if not ranges:
        if not is_negated:
            raise GrammarInvalid("a class of characters is empty")
        return "/(?s:.)/"
    return f"/[{'^' if is_negated else ''}{''.join(ranges)}]/"
