"""Secrets of a local suite."""

from __future__ import annotations

from pathlib import Path

from libs import receipts
from tools.local import credential
from tools.local.place import State


def test_secrets_are_made_once_and_are_their_owners_alone(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.prepare()
    credential.create(state)
    before = {file.name: file.read_bytes() for file in state.secrets.iterdir()}

    credential.create(state)

    assert {file.name: file.read_bytes() for file in state.secrets.iterdir()} == before
    assert {file.stat().st_mode & 0o777 for file in state.secrets.iterdir()} == {0o600}
    assert len(credential.read(credential.cache_secret_file(state))) >= 32


def test_billing_knows_every_key_that_receipts_were_ever_signed_with(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.prepare()
    credential.create(state)
    first = credential.read(credential.receipt_key_file(state))
    credential.receipt_key_file(state).unlink()

    credential.create(state)

    second = credential.read(credential.receipt_key_file(state))
    known = receipts.keys_from_text(credential.read(credential.receipt_keys_file(state)))
    signers = [receipts.ReceiptSigner(receipts.key_from_text(text)) for text in (first, second)]
    assert known == [signer.public_key for signer in signers]


def test_a_suite_of_an_earlier_version_gets_what_it_lacks(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.prepare()
    credential.create(state)
    token = (state.secrets / "gateway.token").read_bytes()
    credential.cache_secret_file(state).unlink()

    credential.create(state)

    assert credential.read(credential.cache_secret_file(state))
    assert (state.secrets / "gateway.token").read_bytes() == token
