"""The table of API keys that a service checks credentials against, without asking anyone.

Pure. Bounded by the number of keys there are. The higher revision of a key wins, so that a late or
repeated message can never bring a revoked key back.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from libs.auth.keys import KEY_ID, parse_key, sha256_of
from libs.auth.principal import Principal, Role
from libs.errors import Reason, Unauthenticated, unavailable
from libs.limits import KEY_TABLE_AGE_MAX_S


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """What is known of a key.

    Attributes:
        key_id: public part of the key.
        secret_sha256: SHA-256 of the whole key, 32 bytes.
        role: what it may do.
        is_active: False once it was revoked.
        project: id of its project; empty for administrators.
        organization: id of the organization that pays; empty for administrators.
        revision: grows with every change of any key.
    """

    key_id: str
    secret_sha256: bytes
    role: Role
    is_active: bool
    project: str
    organization: str
    revision: int


class KeyTable:
    """Keys by id, and when they were last known to be complete."""

    def __init__(self) -> None:
        self._records: dict[str, KeyRecord] = {}
        self._fresh_at_s: float | None = None
        self._on_revoked: list[Callable[[str], None]] = []

    def on_revoked(self, listener: Callable[[str], None]) -> None:
        """Has `listener` called with the id of each key that is revoked from now on."""
        self._on_revoked.append(listener)

    def apply(self, records: Iterable[KeyRecord]) -> None:
        """Adds or replaces records; an older revision than the one at hand is ignored."""
        for record in records:
            known = self._records.get(record.key_id)
            if known is not None and known.revision >= record.revision:
                continue
            self._records[record.key_id] = record
            if known is not None and known.is_active and not record.is_active:
                for listener in self._on_revoked:
                    listener(record.key_id)

    def is_revoked(self, key_id: str) -> bool:
        """Tells whether a key that was accepted before would be refused now."""
        record = self._records.get(key_id)
        return record is None or not record.is_active

    def touch(self, now_s: float) -> None:
        """Says that the table was complete at that monotonic time."""
        self._fresh_at_s = now_s

    def age_s(self, now_s: float) -> float | None:
        """Returns how old the table is; None when it was never complete."""
        return None if self._fresh_at_s is None else now_s - self._fresh_at_s

    def authenticate(self, credential: str, now_s: float) -> Principal:
        """Returns who the credential belongs to.

        Raises:
            Unauthenticated: malformed, unknown or revoked.
            Unavailable: the table is too old to tell.
        """
        # The checksum tells a mistyped key from a wrong one; a right one needs no such look.
        record = self._records.get(credential[KEY_ID])
        is_right = record is not None and hmac.compare_digest(
            record.secret_sha256, sha256_of(credential)
        )
        if not is_right and parse_key(credential) is None:
            raise Unauthenticated("the API key is malformed")
        age = self.age_s(now_s)
        if age is None or age > KEY_TABLE_AGE_MAX_S:
            raise unavailable("auth", retry_after_s=1.0)
        if record is None or not is_right:
            raise Unauthenticated("the API key is not known")
        if not record.is_active:
            raise Unauthenticated("the API key was revoked", reason=Reason.CREDENTIALS_REVOKED)
        return Principal(
            key_id=record.key_id,
            role=record.role,
            project=record.project,
            organization=record.organization,
        )
