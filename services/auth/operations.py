"""What it takes to change a key: chance, the store, the table that callers are checked against.

Each change of a key leaves one audit event in the log, without any secret.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass

import structlog

from libs.auth import KeyTable, new_key
from libs.auth.keys import ID_BITS, SECRET_BITS
from libs.clock import Clock
from libs.errors import Unavailable
from libs.limits import WATCH_POLL_S
from libs.rpc import Hub
from libs.rpc.feed import changes
from services.auth.domain import FirstKey, KeyRequest, StoredKey, first_key_from, key_from
from services.auth.store import AuthStore

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who changes a key.

    Attributes:
        key_id: key of the caller.
        request_id: of the call.
    """

    key_id: str
    request_id: str


BOOTSTRAP = Actor(key_id="", request_id="bootstrap")


class KeyOperations:
    """Creates and revokes keys, and keeps this process's own table of them.

    Args:
        store: where keys are kept.
        table: what this server checks callers against.
        hub: wakes watchers when a key has changed.
        clock: time of records, and of the table's freshness.
        random_bits: chance; takes a number of bits.
    """

    def __init__(
        self,
        store: AuthStore,
        table: KeyTable,
        hub: Hub,
        clock: Clock,
        *,
        random_bits: Callable[[int], int] = secrets.randbits,
    ) -> None:
        self._store = store
        self._table = table
        self._hub = hub
        self._clock = clock
        self._random_bits = random_bits

    async def create(self, request: KeyRequest, actor: Actor) -> tuple[StoredKey, str]:
        """Makes a key; returns what is stored of it, and its secret, which is stored nowhere.

        Raises:
            NotFound: the project is not there.
        """
        made = new_key(self._random_bits(ID_BITS), self._random_bits(SECRET_BITS))
        stored = await self._store.create_key(key_from(request, made, self._clock.now()))
        self._publish(stored)
        _audit("apiKeys.create", stored, actor)
        return stored, made.secret

    async def revoke(self, key_id: str, actor: Actor) -> StoredKey:
        """Revokes a key for ever. May be repeated; this process refuses the key at once.

        Raises:
            NotFound: there is none.
        """
        stored, is_change = await self._store.revoke_key(key_id, self._clock.now())
        self._publish(stored)
        if is_change:
            _audit("apiKeys.revoke", stored, actor)
        return stored

    async def put_first(self, secret: str) -> FirstKey:
        """Stores the administrator's key of the configuration if there is no key at all.

        Raises:
            ValueError: the text is no key.
        """
        key = first_key_from(secret, self._clock.now())
        outcome = await self._store.put_first_key(key)
        match outcome:
            case FirstKey.STORED:
                _audit("apiKeys.create", await self._store.get_key(key.key_id), BOOTSTRAP)
            case FirstKey.IGNORED:
                log.warning("bootstrap key ignored", cause="there are other keys", key=key.key_id)
            case FirstKey.KNOWN:
                pass
        return outcome

    async def fill_table(self) -> None:
        """Fills this process's table for the first time. Raises Unavailable."""
        await self._follow_store(only_snapshot=True)

    async def keep_table(self) -> None:
        """Keeps this process's table fresh for ever. It ages while the database is away."""
        while True:
            try:
                await self._follow_store(only_snapshot=False)
            except Unavailable:
                await self._clock.sleep_s(WATCH_POLL_S)

    async def _follow_store(self, *, only_snapshot: bool) -> None:
        async with aclosing(changes(self._hub, self._store.list_keys_after)) as feed:
            is_complete = False
            async for item in feed:
                self._table.apply(key.record for key in item.items)
                is_complete = is_complete or item.completes_snapshot
                if is_complete:
                    self._table.touch(self._clock.monotonic_s())
                if is_complete and only_snapshot:
                    return

    def _publish(self, stored: StoredKey) -> None:
        self._table.apply([stored.record])
        self._hub.poke()


def _audit(action: str, stored: StoredKey, actor: Actor) -> None:
    key = stored.api_key
    log.info(
        "audit",
        action=action,
        key=key.key_id,
        role=key.role.value,
        project=key.project_id,
        organization=stored.organization_id,
        actor=actor.key_id,
        request_id=actor.request_id,
    )
