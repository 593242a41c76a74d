"""The text layer against a naive reference: join everything, find the first stop, cut."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.stops import matcher_of
from services.worker.text import OutputText, Release, TokenPieces, _whole

VOCABULARY = (
    b"a", b"b", b"ab", b"ba", b"aab", b"", b"c a", "é".encode(), "€a".encode(), "😀".encode(),
    b"\xe2", b"\x82", b"\xac", b"\xf0\x9f", b"\x98\x80", b"\x80", b"\xff", b"a\xe2", b"\x82\xacb",
    b"\xed\xa0", b"\xef\xbf\xbd",
)  # fmt: skip
PIECES = TokenPieces(list(VOCABULARY), [_whole(piece) for piece in VOCABULARY])

tokens = st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=24)
stops = st.lists(
    st.sampled_from(["a", "ab", "aba", "bab", "b", "é", "€", "a€", "😀b", "\ufffd", "aa", "c"]),
    max_size=4,
).map(tuple)


def ids(*pieces: bytes) -> list[int]:
    return [VOCABULARY.index(piece) for piece in pieces]


@dataclass
class Shown:
    token_ids: list[int]
    text: str
    stop: str | None


def naive(token_ids: list[int], sequences: tuple[str, ...]) -> Shown:
    data = b"".join(VOCABULARY[token_id] for token_id in token_ids)
    text = data.decode("utf-8", "replace")
    for end in range(1, len(text) + 1):
        found = [stop for stop in sequences if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            start = end - len(stop)
            return Shown(visible(token_ids, data, start), text[:start], stop)
    return Shown(token_ids, text, None)


def visible(token_ids: list[int], data: bytes, start: int) -> list[int]:
    """The tokens before the first one that begins behind `start`."""
    offset = 0
    for count, token_id in enumerate(token_ids):
        piece = VOCABULARY[token_id]
        # An unfinished character at the end of a prefix is decoded to one character too.
        if piece and len(data[: offset + 1].decode("utf-8", "replace")) > start:
            return token_ids[:count]
        if not piece and len(data[:offset].decode("utf-8", "replace")) > start:
            return token_ids[:count]
        offset += len(piece)
    return token_ids


def collect(text: OutputText, token_ids: list[int]) -> tuple[list[Release], Shown]:
    releases = [text.push(token_id) for token_id in token_ids]
    releases.append(text.finish())
    return releases, Shown(
        [token_id for release in releases for token_id in release.token_ids],
        "".join(release.text for release in releases),
        next((release.stop for release in releases if release.stop is not None), None),
    )


@settings(deadline=None)
@given(token_ids=tokens, sequences=stops)
def test_all_together_equals_the_naive_reference(
    token_ids: list[int], sequences: tuple[str, ...]
) -> None:
    _, shown = collect(OutputText(PIECES, matcher_of(sequences)), token_ids)

    assert shown == naive(token_ids, sequences)


@settings(deadline=None)
@given(token_ids=tokens, sequences=stops)
def test_released_text_is_always_the_whole_text_of_the_released_tokens(
    token_ids: list[int], sequences: tuple[str, ...]
) -> None:
    text = OutputText(PIECES, matcher_of(sequences))
    released: list[int] = []
    shown = ""

    for token_id in token_ids:
        release = text.push(token_id)
        if release.stop is not None:
            return
        released.extend(release.token_ids)
        shown += release.text
        data = b"".join(VOCABULARY[token_id] for token_id in released)
        assert shown == data.decode("utf-8", "replace")
        assert bool(release.token_ids) or not release.text


@settings(deadline=None)
@given(token_ids=tokens, sequences=stops)
def test_no_more_is_held_than_needed(token_ids: list[int], sequences: tuple[str, ...]) -> None:
    text = OutputText(PIECES, matcher_of(sequences))
    released = 0

    for pushed, token_id in enumerate(token_ids, start=1):
        release = text.push(token_id)
        if release.stop is not None:
            return
        released += len(release.token_ids)
        assert released == releasable(token_ids[:pushed], sequences)


def releasable(token_ids: list[int], sequences: tuple[str, ...]) -> int:
    """Tokens up to the last place where no character is unfinished and no stop can have begun."""
    whole, _ = decode(token_ids)
    held = max(
        (size for stop in sequences for size in range(1, len(stop)) if whole.endswith(stop[:size])),
        default=0,
    )
    for count in range(len(token_ids), -1, -1):
        text, unfinished = decode(token_ids[:count])
        if not unfinished and len(text) <= len(whole) - held:
            return count
    raise AssertionError


def decode(token_ids: list[int]) -> tuple[str, bool]:
    """Certain text, and whether a character is unfinished: more bytes could change the end."""
    data = b"".join(VOCABULARY[token_id] for token_id in token_ids)
    whole = data.decode("utf-8", "replace")
    for more in (b"\x80", b"\xa0", b"\x80\x80", b"\x80\x80\x80", b"\xa0\x80"):
        longer = (data + more).decode("utf-8", "replace")
        if not longer.startswith(whole + "\ufffd"):
            return whole[:-1], True
    return whole, False


@settings(deadline=None)
@given(token_ids=tokens, sequences=stops, is_end_lost=st.booleans())
def test_another_worker_goes_on_as_the_first_would_have_from_every_place(
    token_ids: list[int],
    sequences: tuple[str, ...],
    is_end_lost: bool,  # noqa: FBT001 - drawn
) -> None:
    """Behind a match, too, and behind the natural end: there only the word of the end was lost."""
    whole = naive(token_ids, sequences)
    for lost_at in range(len(token_ids) + 1):
        first = OutputText(PIECES, matcher_of(sequences))
        before = [first.push(token_id) for token_id in token_ids[:lost_at]]
        if is_end_lost and lost_at == len(token_ids):
            before.append(first.finish())
        released = [token_id for release in before for token_id in release.token_ids]

        second = OutputText(PIECES, matcher_of(sequences))
        left = [] if second.prime(released) else token_ids[len(released) :]
        _, rest = collect(second, left)

        assert released + rest.token_ids == whole.token_ids
        assert "".join(release.text for release in before) + rest.text == whole.text
        assert rest.stop == whole.stop


def test_plain_tokens_pass_one_by_one() -> None:
    text = OutputText(PIECES)

    releases = [text.push(token_id) for token_id in ids(b"a", b"ab", b"")]

    assert [(list(release.token_ids), release.text) for release in releases] == [
        (ids(b"a"), "a"),
        (ids(b"ab"), "ab"),
        (ids(b""), ""),
    ]
    assert text.is_clear


def test_a_character_comes_with_its_last_byte_and_all_its_tokens() -> None:
    text = OutputText(PIECES)

    releases = [text.push(token_id) for token_id in ids(b"\xe2", b"\x82", b"\xac")]

    assert [len(release.token_ids) for release in releases] == [0, 0, 3]
    assert releases[2].text == "€"
    assert text.is_clear


def test_an_unfinished_character_is_replaced_only_at_the_end() -> None:
    text = OutputText(PIECES)

    assert text.push(ids(b"\xe2")[0]).text == ""
    assert text.finish().text == "\ufffd"


def test_a_stop_sequence_over_three_tokens_counts_only_what_is_visible() -> None:
    text = OutputText(PIECES, matcher_of(("bab",)))

    releases = [text.push(token_id) for token_id in ids(b"a", b"", b"ab", b"a", b"b")]

    assert [release.text for release in releases] == ["a", "", "", "", "a"]
    assert list(releases[-1].token_ids) == ids(b"ab")
    assert releases[-1].stop == "bab"
    assert text.push(0).token_ids == ()


def test_control_tokens_before_a_match_count_and_those_inside_do_not() -> None:
    text = OutputText(PIECES, matcher_of(("ab",)))

    before = text.push(ids(b"c a")[0])
    inside = text.push(ids(b"")[0])
    match = text.push(ids(b"b")[0])

    assert (list(before.token_ids), list(inside.token_ids)) == ([], [])
    assert (list(match.token_ids), match.text) == (ids(b"c a"), "c ")


def test_a_sequence_begun_in_text_released_elsewhere_still_ends_the_output() -> None:
    text = OutputText(PIECES, matcher_of(("aab",)))
    text.prime(ids(b"a", b"a"))

    release = text.push(ids(b"b")[0])

    assert release == Release([], "", "aab")


def test_a_match_that_was_shown_in_part_is_an_end_for_who_goes_on() -> None:
    text = OutputText(PIECES, matcher_of(("ab",)))

    assert text.prime(ids(b"b", b"aab"))

    assert text.finish() == Release((), "", "ab")


@pytest.mark.parametrize("size", [1, 10_000])
def test_priming_reads_only_the_end(size: int) -> None:
    text = OutputText(PIECES, matcher_of(("ab",)))

    text.prime(ids(b"a\xe2") * size)

    release = text.push(ids(b"\x82\xacb")[0])
    assert (release.text, release.stop) == ("€b", None)


@settings(deadline=None)
@given(token_ids=tokens, sequences=stops)
def test_a_stop_sequence_that_is_included_ends_what_is_shown(
    token_ids: list[int], sequences: tuple[str, ...]
) -> None:
    without = naive(token_ids, sequences)

    _, shown = collect(OutputText(PIECES, matcher_of(sequences), includes_stop=True), token_ids)

    assert shown.stop == without.stop
    assert shown.text == without.text + (without.stop or "")
    data = b"".join(VOCABULARY[token_id] for token_id in token_ids)
    assert shown.token_ids == (
        without.token_ids if without.stop is None else visible(token_ids, data, len(shown.text))
    )
