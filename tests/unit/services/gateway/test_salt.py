"""Salts and affinities: equal where they have to be, and nowhere else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.salt import AFFINITY_BYTES, SALT_BYTES, Salts

NAMES = st.text(max_size=6)
SALTS = Salts(b"secret")


@given(one=st.tuples(NAMES, NAMES, NAMES), other=st.tuples(NAMES, NAMES, NAMES))
def test_salts_are_equal_for_equal_tenants_and_salts_only(
    one: tuple[str, str, str], other: tuple[str, str, str]
) -> None:
    made = SALTS.cache_salt(*one)

    assert len(made) == SALT_BYTES
    assert (made == SALTS.cache_salt(*other)) == (one == other)


def test_no_tenant_can_write_itself_into_another() -> None:
    """Parts that run together read the same without their lengths."""
    assert SALTS.cache_salt("o", "p", "x") != SALTS.cache_salt("o", "px", "")
    assert SALTS.cache_salt("o", "p\x00", "") != SALTS.cache_salt("o", "p", "\x00")
    assert SALTS.cache_salt("o", "p", "") != SALTS.cache_salt("o2", "p", "")


def test_another_secret_makes_other_salts() -> None:
    args = ("o", "p", "x")
    assert Salts(b"other").cache_salt(*args) != SALTS.cache_salt(*args)
    assert Salts(b"secret").cache_salt(*args) == SALTS.cache_salt(*args)
    # More than BLAKE2b takes as a key.
    assert Salts(b"s" * 65).cache_salt(*args) != Salts(b"s" * 64).cache_salt(*args)


def test_an_affinity_is_of_the_tenants_key_or_of_the_adapter() -> None:
    mine = SALTS.affinity("o", "p", key="k", adapter="adapters/a")
    assert len(mine) == AFFINITY_BYTES
    assert mine == SALTS.affinity("o", "p", key="k", adapter="")
    assert mine != SALTS.affinity("o", "q", key="k", adapter="")
    adapted = SALTS.affinity("o", "p", key="", adapter="adapters/a")
    assert adapted == SALTS.affinity("o2", "q", key="", adapter="adapters/a")
    assert adapted != SALTS.affinity("o", "p", key="", adapter="adapters/b")
    assert SALTS.affinity("o", "p", key="", adapter="") == b""


def test_an_affinity_is_never_a_salt() -> None:
    salt = SALTS.cache_salt("o", "p", "k")
    assert not salt.startswith(SALTS.affinity("o", "p", key="k", adapter=""))
