"""Secrets of a local suite: made once, kept in files that only their owner can read."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from libs import receipts
from libs.auth import keys
from tools.local.place import SERVICES, STATEFUL, State

_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_TOKEN_LENGTH = 43


def write(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Replaces a file in one step; nobody else ever sees it open or half written."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    scratch.replace(path)


def read(path: Path) -> str:
    """Reads a secret, without its line end; empty when there is none."""
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def create(state: State) -> None:
    """Makes what is missing: service tokens, passwords, all other keys."""
    for service in SERVICES:
        token = state.secrets / f"{service}.token"
        if not read(token):
            body = "".join(secrets.choice(_BASE62) for _ in range(_TOKEN_LENGTH))
            write(token, f"ms_{service}_{body}\n")
        digest = keys.sha256_of(read(token)).hex()
        write(state.secrets / f"{service}.sha256", f"{digest}\n")
    for role in STATEFUL:
        password = password_file(state, role)
        if not read(password):
            write(password, f"{secrets.token_urlsafe(24)}\n")
    if not read(admin_key_file(state)):
        key = keys.new_key(secrets.randbits(keys.ID_BITS), secrets.randbits(keys.SECRET_BITS))
        write(admin_key_file(state), f"{key.secret}\n")
    if not read(cache_secret_file(state)):
        write(cache_secret_file(state), f"{secrets.token_urlsafe(32)}\n")
    _create_receipt_key(state)


def _create_receipt_key(state: State) -> None:
    """Makes what gateways sign receipts with, and has billing know it beside those before it."""
    file = receipt_key_file(state)
    if not read(file):
        write(file, f"{receipts.key_to_text(secrets.token_bytes(receipts.SEED_BYTES))}\n")
    signer = receipts.ReceiptSigner(receipts.key_from_text(read(file)))
    known = read(receipt_keys_file(state)).splitlines()
    public = receipts.key_to_text(signer.public_key)
    if public not in known:
        write(receipt_keys_file(state), "".join(f"{line}\n" for line in [*known, public]))


def password_file(state: State, role: str) -> Path:
    """Password of a service's database role."""
    return state.secrets / f"{role}.postgres"


def admin_key_file(state: State) -> Path:
    """The key that auth puts into an empty database."""
    return state.secrets / "admin_key"


def cache_secret_file(state: State) -> Path:
    """What gateways keep the prefix caches of tenants apart with."""
    return state.secrets / "cache_secret"


def receipt_key_file(state: State) -> Path:
    """What gateways sign receipts with."""
    return state.secrets / "receipt_key"


def receipt_keys_file(state: State) -> Path:
    """Public keys of receipts, for billing and for whoever verifies them."""
    return state.secrets / "receipt_keys"


def tenant_key_file(state: State) -> Path:
    """The key of the project `dev`, made by the seed."""
    return state.secrets / "dev_api_key"


def passwords(state: State) -> dict[str, str]:
    """Environment of deploy/postgres/roles.sql."""
    return {f"{role.upper()}_PASSWORD": read(password_file(state, role)) for role in STATEFUL}
