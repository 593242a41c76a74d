from __future__ import annotations

import time

import pytest

from services.worker.regexes import RegexInvalid, check_regex


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "(a{100}){200}",
        "[]a{9999}]{20000}",
        "[^]b][[:alpha:][0-9]]*",
        r"\{99999\}\p{L}{10}",
        "a?" * 2000,
        "(yes|no){2}",
        "({",
        "a" * 16384,
    ],
)
def test_what_is_affordable_passes(pattern: str) -> None:
    check_regex(pattern)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a{1000}){1000}", "places"),
        ("((a{100}){100}){100}", "places"),
        ("(?:[ab]{0,200}|c){101}", "places"),
        ("a{20001,}", "places"),
        ("a{99999999999999999999}", "places"),
        ("a{3000}" * 7, "places"),
        ("a?" * 2001, "repetitions"),
        ("(" * 300, "nested"),
    ],
)
def test_what_is_not_affordable_is_refused_at_once(pattern: str, message: str) -> None:
    began = time.perf_counter()

    with pytest.raises(RegexInvalid, match=message):
        check_regex(pattern)

    assert time.perf_counter() - began < 1
