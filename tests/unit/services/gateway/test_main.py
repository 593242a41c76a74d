"""What the gateway's process needs before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from libs.process import StartError
from libs.receipts import ReceiptSigner, key_to_text
from services.gateway.__main__ import cache_secret, receipt_signer


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


def test_receipts_are_signed_with_the_key_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "receipt_key"
    seed = bytes(range(32))
    file.write_text(f"{key_to_text(seed)}\n")

    signer = receipt_signer(file)

    assert signer is not None
    assert signer.key_id == ReceiptSigner(seed).key_id
    assert receipt_signer(None) is None


@pytest.mark.parametrize("text", [None, " \n", "no key", "c2hvcnQ="])
def test_a_file_without_a_receipt_key_says_what_to_do(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "receipt_key"
    if text is not None:
        file.write_text(text)

    with pytest.raises(StartError, match=r"gateway\.receipt_key_file") as caught:
        receipt_signer(file)

    assert "base64 of 32 random bytes" in str(caught.value)
    assert "c2hvcnQ" not in str(caught.value)
