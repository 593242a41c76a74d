"""Receipts: signed, verified, and what breaks them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st
from maas.common.v1 import receipt_pb2

from libs.receipts import (
    RECEIPT_BYTES_MAX,
    BadReceipt,
    ReceiptContent,
    ReceiptKeys,
    ReceiptSigner,
    content_of,
    key_from_text,
    key_id_of,
    key_to_text,
    keys_from_text,
)

START = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)
CONTENT = ReceiptContent(
    generation_id="gen_g1_01ARZ3NDEKTSV4RRFFQ69G5FAV",
    request_id="order-7",
    account="accounts/acme",
    project="projects/demo",
    offering="offerings/tiny",
    model_version="models/tiny/versions/1",
    price="prices/nano",
    input_tokens=10,
    cached_input_tokens=4,
    output_tokens=7,
    reasoning_tokens=2,
    charge_nanos=17,
    end_cause=1,
    start_time=START,
    end_time=START + timedelta(seconds=2),
)
SIGNER = ReceiptSigner(bytes(range(32)))
KEYS = ReceiptKeys([SIGNER.public_key])


def verify(signed: receipt_pb2.SignedReceipt) -> ReceiptContent:
    return KEYS.verify(receipt=signed.receipt, key_id=signed.key_id, signature=signed.signature)


def test_a_signed_receipt_verifies_and_says_what_was_signed() -> None:
    assert verify(SIGNER.sign(CONTENT)) == CONTENT


def test_the_signature_is_that_of_the_contract() -> None:
    signed = SIGNER.sign(CONTENT)

    # By the library alone, as any client in any language would do it.
    key = Ed25519PublicKey.from_public_bytes(SIGNER.public_key)
    key.verify(signed.signature, b"maas.receipt.v1\0" + signed.receipt)
    assert len(signed.signature) == 64
    # Of the seed 00 01 .. 1f; the digest by sha256sum.
    assert SIGNER.public_key.hex() == (
        "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"
    )
    assert signed.key_id == "56475aa75463474c"


def test_equal_content_has_equal_bytes_whoever_signs_it() -> None:
    again = ReceiptSigner(bytes(32)).sign(CONTENT._replace())

    assert again.receipt == SIGNER.sign(CONTENT).receipt
    assert SIGNER.sign(CONTENT) == SIGNER.sign(CONTENT)


def test_any_flipped_bit_breaks_it() -> None:
    signed = SIGNER.sign(CONTENT)
    for field in ("receipt", "signature"):
        whole = getattr(signed, field)
        for index in range(len(whole)):
            broken = receipt_pb2.SignedReceipt()
            broken.CopyFrom(signed)
            flipped = whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :]
            setattr(broken, field, flipped)

            with pytest.raises(BadReceipt, match="signature"):
                verify(broken)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(ReceiptContent._fields),
    st.integers(1, 2**40),
)
def test_whatever_differs_has_other_bytes(name: str, number: int) -> None:
    old = getattr(CONTENT, name)
    match old:
        case str():
            new: object = f"{old}{number}"
        case int():
            # An end cause has 32 bits.
            new = old + number % 2**31
        case _:
            new = old + timedelta(microseconds=number)
    changed: dict[str, Any] = {name: new}
    other = CONTENT._replace(**changed)

    assert content_of(other.serialized()) == other
    assert (other.serialized() == CONTENT.serialized()) == (old == new)


def test_a_receipt_of_another_key_is_refused() -> None:
    signed = ReceiptSigner(bytes(32)).sign(CONTENT)
    with pytest.raises(BadReceipt, match="no such key"):
        verify(signed)

    signed.key_id = SIGNER.key_id
    with pytest.raises(BadReceipt, match="signature"):
        verify(signed)


def test_what_a_later_version_adds_does_not_matter() -> None:
    # Field 99, a varint.
    extended = CONTENT.serialized() + b"\x98\x06\x01"

    assert content_of(extended) == CONTENT


@pytest.mark.parametrize(
    "receipt",
    [
        b"\xff",
        b"",
        receipt_pb2.Receipt(currency_code="EUR").SerializeToString(),
        CONTENT.serialized() + b"x" * RECEIPT_BYTES_MAX,
    ],
)
def test_what_is_no_receipt_is_refused(receipt: bytes) -> None:
    with pytest.raises(BadReceipt):
        content_of(receipt)


def test_times_count_to_the_microsecond() -> None:
    before = CONTENT._replace(start_time=datetime(1969, 12, 31, 23, 59, 59, 1, UTC))

    assert content_of(before.serialized()) == before


@pytest.mark.parametrize("length", [0, 31, 33])
def test_keys_of_another_length_are_refused(length: int) -> None:
    with pytest.raises(BadReceipt):
        ReceiptSigner(bytes(length))
    with pytest.raises(BadReceipt):
        ReceiptKeys([bytes(length)])
    with pytest.raises(BadReceipt):
        key_from_text(key_to_text(bytes(length)))


def test_a_file_of_keys_may_have_comments() -> None:
    other = ReceiptSigner(bytes(32)).public_key
    text = f"# gateways\n\n{key_to_text(SIGNER.public_key)}\n  {key_to_text(other)}  \n"

    assert keys_from_text(text) == [SIGNER.public_key, other]
    assert SIGNER.key_id in ReceiptKeys(keys_from_text(text))
    assert ReceiptKeys([other]).public_keys == {key_id_of(other): other}


@pytest.mark.parametrize("line", ["not base64!", "AAAA", "Ünïcode"])
def test_a_bad_line_of_keys_is_named(line: str) -> None:
    with pytest.raises(BadReceipt, match="line 2"):
        keys_from_text(f"# first\n{line}\n")
