"""What a regular expression costs, before anything compiles it. Pure; linear.

llguidance bounds most of what it does, but not the time that counted repetitions take: they are
written out.
"""

from __future__ import annotations

import re

SIZE_MAX = 20_000
QUANTIFIERS_MAX = 2000
NESTING_MAX = 200

_TOKEN = re.compile(
    r"""(?P<escape>\\(?:[pPx]\{[^}]*\}|.))|(?P<open>\()|(?P<close>\))|(?P<bar>\|)
    |(?P<class>\[)|(?P<quantifier>[*+?]|\{(?P<least>\d+)(?P<comma>,)?(?P<most>\d+)?\})
    |(?P<plain>.)""",
    re.VERBOSE | re.DOTALL,
)
_CLASS_TOKEN = re.compile(r"\\.|[\[\]]|[^\\\[\]]+", re.DOTALL)


class RegexInvalid(Exception):
    """It is larger than the bounds. The message quotes nothing of it."""


def check_regex(pattern: str) -> None:
    """Checks what an expression comes to with its repetitions written out.

    Whether it is one at all, llguidance says.

    Raises:
        RegexInvalid: it comes to more than 20,000 places, has more than 2000 repetitions, or is
            nested deeper than 200.
    """
    # Sizes of the open groups so far; and of the last thing in each.
    sizes, lasts = [0], [0]
    quantifiers = 0
    position = 0
    while position < len(pattern):
        found = _TOKEN.match(pattern, position)
        assert found is not None  # Its last alternative matches anything.
        position = found.end()
        match found.lastgroup:
            case "open":
                sizes.append(0)
                lasts.append(0)
            case "close" if len(sizes) > 1:
                size = max(sizes.pop(), 1)
                lasts.pop()
                sizes[-1] += size
                lasts[-1] = size
            case "bar":
                lasts[-1] = 0
            case "quantifier":
                quantifiers += 1
                count = _count(found)
                sizes[-1] += lasts[-1] * (count - 1)
                lasts[-1] *= count
            case _:
                position = _class_end(pattern, position) if found["class"] else position
                sizes[-1] += 1
                lasts[-1] = 1
        if sizes[-1] > SIZE_MAX:
            raise RegexInvalid(f"comes to more than {SIZE_MAX} places, repetitions written out")
        if quantifiers > QUANTIFIERS_MAX:
            raise RegexInvalid(f"has more than {QUANTIFIERS_MAX} repetitions")
        if len(sizes) > NESTING_MAX:
            raise RegexInvalid(f"is nested deeper than {NESTING_MAX}")


def _count(quantifier: re.Match[str]) -> int:
    """Returns how often the thing before a quantifier is written out; at least once."""
    if quantifier["least"] is None:
        return 1
    digits = quantifier["most"] or quantifier["least"]
    return max(int(digits[:7]), 1) if len(digits) < 7 else SIZE_MAX + 1  # noqa: PLR2004


def _class_end(pattern: str, position: int) -> int:
    """Returns where a class of characters ends, which may have others in it."""
    if pattern.startswith("^", position):
        position += 1
    if pattern.startswith("]", position):
        position += 1
    depth = 1
    while depth:
        found = _CLASS_TOKEN.match(pattern, position)
        if found is None:
            return len(pattern)
        position = found.end()
        depth += {"[": 1, "]": -1}.get(found.group(), 0)
    return position
