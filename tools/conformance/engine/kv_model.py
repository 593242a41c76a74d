"""What is known of an engine's prefix cache by who only hears its events."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from services.worker.engine.kv_events import KvEvent, KvRemoved, KvStored, chain


class KvModel:
    """What somebody believes who hears an engine's events: whatever the salt, a block is there."""

    def __init__(self, block_tokens: int) -> None:
        """Believes that nothing is there.

        Args:
            block_tokens: in a block.
        """
        self._block_tokens = block_tokens
        self.names: set[int] = set()

    def apply(self, events: Iterable[KvEvent]) -> None:
        """Hears events."""
        for event in events:
            if isinstance(event, KvStored):
                self.names.update(event.hashes)
            elif isinstance(event, KvRemoved):
                self.names.difference_update(event.hashes)
            else:
                self.names.clear()

    def prefix_blocks(self, prompt_ids: Sequence[int]) -> int:
        """How many blocks a prompt begins with that are there. The last token is never read."""
        name: int | None = None
        whole = (len(prompt_ids) - 1) // self._block_tokens
        for at in range(whole):
            start = at * self._block_tokens
            name = chain(name, prompt_ids[start : start + self._block_tokens])
            if name not in self.names:
                return at
        return whole
