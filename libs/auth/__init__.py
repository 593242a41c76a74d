"""Who calls: API keys, roles and the table of keys that every service checks against.

Pure: no gRPC, no SQL. The table is fed by `libs.rpc.key_watch`; in the auth service by its store.
"""

from __future__ import annotations

from libs.auth.keys import NewKey, key_id_of, new_key, parse_key, sha256_of
from libs.auth.principal import Principal, Role, permits
from libs.auth.table import KeyRecord, KeyTable

__all__ = [
    "KeyRecord",
    "KeyTable",
    "NewKey",
    "Principal",
    "Role",
    "key_id_of",
    "new_key",
    "parse_key",
    "permits",
    "sha256_of",
]
