"""What the tenants' own names of caches become before they leave the gateway.

Workers share the prefix cache between executions with equal salts, and the scheduler sends requests
with equal affinity to the same worker. Both are keyed digests over the tenant and what the tenant
said: two tenants never have equal ones, whatever they say, and neither can make another's. All
gateways of a cluster have the same secret.
"""

from __future__ import annotations

import hashlib

SALT_BYTES = 32
AFFINITY_BYTES = 16
# The most that BLAKE2b takes as a key.
SECRET_BYTES_MAX = 64


class Salts:
    """Makes salts and affinities."""

    def __init__(self, secret: bytes) -> None:
        """Keeps the key.

        Args:
            secret: of the cluster. Never logged, never sent.
        """
        # A longer secret counts in full.
        is_long = len(secret) > SECRET_BYTES_MAX
        self._key = hashlib.blake2b(secret).digest() if is_long else secret

    def cache_salt(self, organization: str, project: str, salt: str) -> bytes:
        """Returns the salt of the prefix cache.

        Args:
            organization: id of who pays.
            project: id of who asks.
            salt: the client's own; may be empty.
        """
        return self._digest(SALT_BYTES, organization, project, salt)

    def affinity(self, organization: str, project: str, *, key: str, adapter: str) -> bytes:
        """Returns what requests have in common that should run on the same worker; may be empty.

        Args:
            organization: id of who pays.
            project: id of who asks.
            key: the client's own; may be empty.
            adapter: "adapters/{adapter}", which one worker has loaded already; may be empty.
        """
        if key:
            return self._digest(AFFINITY_BYTES, organization, project, "affinity", key)
        if adapter:
            # A shared adapter is loaded for everybody, and says nothing of a tenant.
            return self._digest(AFFINITY_BYTES, "", "", "adapter", adapter)
        return b""

    def _digest(self, size: int, *parts: str) -> bytes:
        # Lengths, so that no two lists of parts read the same.
        data = b"".join(
            len(part).to_bytes(4, "big") + part for part in (text.encode() for text in parts)
        )
        return hashlib.blake2b(data, digest_size=size, key=self._key).digest()
