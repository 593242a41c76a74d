"""What the gateway's process needs before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from libs.process import StartError
from services.gateway.__main__ import cache_secret


def test_gateways_with_the_same_file_have_the_same_secret(tmp_path: Path) -> None:
    file = tmp_path / "cache_secret"
    file.write_text("abc\n")

    assert cache_secret(file) == cache_secret(file) == b"abc"
    assert cache_secret(None) != cache_secret(None)


@pytest.mark.parametrize("text", [None, " \n"])
def test_a_file_without_a_secret_says_what_to_do(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "cache_secret"
    if text is not None:
        file.write_text(text)

    with pytest.raises(StartError, match=r"gateway\.cache_secret_file") as caught:
        cache_secret(file)

    assert str(file) in str(caught.value)
    assert "random text" in str(caught.value)
