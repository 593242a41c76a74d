"""The simulated LoRA adapters: nothing but their digests, and the time that loading takes."""

from __future__ import annotations

import re
from collections import OrderedDict

from services.worker.engine.base import Adapter, AdapterUnusable

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def check(adapter: Adapter) -> None:
    """Checks all there is to check.

    Raises:
        AdapterUnusable: its digest is none.
    """
    if not _DIGEST.fullmatch(adapter.digest):
        raise AdapterUnusable(
            f"{adapter.name}: the digest is not sha256: and 64 hexadecimal digits"
        )


class SimAdapters:
    """Adapters in the simulated GPU's memory."""

    def __init__(self, most: int) -> None:
        """Starts with none.

        Args:
            most: that fit.
        """
        self._most = most
        self._names: OrderedDict[str, str] = OrderedDict()

    @property
    def names(self) -> tuple[str, ...]:
        """Of those that are loaded, the one unused for longest first."""
        return tuple(self._names.values())

    def has(self, adapter: Adapter) -> bool:
        """Whether it is loaded."""
        return adapter.digest in self._names

    def use(self, adapter: Adapter) -> None:
        """Loads it unless it is loaded; drops the one unused for longest when there is no room."""
        self._names[adapter.digest] = adapter.name
        self._names.move_to_end(adapter.digest)
        if len(self._names) > self._most:
            self._names.popitem(last=False)
