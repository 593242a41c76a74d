"""libs/auth/keys.py: the form of API keys."""

from __future__ import annotations

import binascii
import hashlib
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.auth.keys import ID_BITS, SECRET_BITS, key_id_of, new_key, parse_key, sha256_of

ids = st.integers(0, 2**ID_BITS - 1)
secrets = st.integers(0, 2**SECRET_BITS - 1)

# Written down: a key that was given out must be recognised by every later build.
GOLDEN = "mk_000000003ia7_0000000000000000000000000000000000000000AlX1LLz7U"


def test_form_of_keys_never_changes() -> None:
    made = new_key(163_663, 41_387)

    assert made.secret == GOLDEN
    assert made.key_id == "000000003ia7"
    assert parse_key(GOLDEN) == "000000003ia7"
    assert sha256_of(GOLDEN) == hashlib.sha256(GOLDEN.encode()).digest()


def test_checksum_is_the_crc_of_all_before_it() -> None:
    digits = string.digits + string.ascii_uppercase + string.ascii_lowercase

    value = 0
    for character in GOLDEN[-6:]:
        value = value * 62 + digits.index(character)

    assert value == binascii.crc32(GOLDEN[:-6].encode())


@given(ids, secrets)
def test_made_key_is_well_formed(id_bits: int, secret_bits: int) -> None:
    made = new_key(id_bits, secret_bits)

    assert parse_key(made.secret) == made.key_id
    assert len(made.secret) == 65


def test_extreme_chance_fits_into_the_form() -> None:
    made = new_key(2**ID_BITS - 1, 2**SECRET_BITS - 1)

    assert parse_key(made.secret) == made.key_id


@given(ids, secrets, st.data())
def test_one_wrong_character_is_noticed(
    id_bits: int, secret_bits: int, data: st.DataObject
) -> None:
    secret = new_key(id_bits, secret_bits).secret
    place = data.draw(st.integers(0, len(secret) - 1))
    other = data.draw(st.sampled_from("0aZ_-é").filter(lambda one: one != secret[place]))

    assert parse_key(secret[:place] + other + secret[place + 1 :]) is None


@pytest.mark.parametrize(
    "text", ["", "mk_", GOLDEN[:-1], GOLDEN + "0", f" {GOLDEN}", f"{GOLDEN}\n", GOLDEN.upper()]
)
def test_text_of_another_form_is_no_key(text: str) -> None:
    assert parse_key(text) is None
    with pytest.raises(ValueError, match="not an API key") as caught:
        key_id_of(text)
    assert GOLDEN not in str(caught.value)


def test_different_chance_makes_different_keys() -> None:
    made = {new_key(number, secret).secret for number in range(8) for secret in range(8)}

    assert len(made) == 64
