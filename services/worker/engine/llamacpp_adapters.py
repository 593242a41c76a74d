"""LoRA adapters that the llamacpp engine has loaded: which ones, and which one goes for another.

At most RESIDENT_MAX are in memory. Room for another is made by dropping the one unused for longest;
those of lanes that run are never dropped, so when all are in use a lane with yet another adapter
waits. Adapters with equal digests are the same.

Pure: no ctypes. What loads is given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Protocol

from services.worker.engine.base import Adapter, AdapterUnusable

Handle = int

RESIDENT_MAX: Final = 8
_NAMES_MAX: Final = 8


class AdapterLoader(Protocol):
    """What brings adapters into memory and out of it."""

    def check_adapter(self, adapter: Adapter) -> None:
        """Reads an adapter's description.

        Raises:
            AdapterUnusable: its file is no adapter, or not one of this model.
        """
        ...

    def load_adapter(self, adapter: Adapter) -> Handle:
        """Loads an adapter.

        Raises:
            AdapterUnusable: its file is no adapter, or not one of this model.
        """
        ...

    def free_adapter(self, handle: Handle) -> None:
        """Frees an adapter that no context uses."""
        ...


@dataclass(slots=True)
class _Resident:
    """An adapter in memory; `names` are those under which it was asked for, oldest first."""

    handle: Handle
    names: dict[str, None] = field(default_factory=dict)
    users: int = 0


class AdapterShelf:
    """The adapters in memory.

    Args:
        loader: what loads them.
        resident_max: most of them.
    """

    def __init__(self, loader: AdapterLoader, *, resident_max: int = RESIDENT_MAX) -> None:
        self._loader = loader
        self._resident_max = resident_max
        self._residents: dict[str, _Resident] = {}  # By digest, the one unused for longest first.

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters in memory."""
        return tuple(name for one in self._residents.values() for name in one.names)

    def load(self, adapter: Adapter) -> None:
        """Loads an adapter, unless it is loaded; checks it only, when all others are in use.

        Raises:
            AdapterUnusable: its file is no adapter, or not one of this model.
        """
        if self.has_room_for(adapter):
            self._use(adapter)
        else:
            self._loader.check_adapter(adapter)

    def has_room_for(self, adapter: Adapter) -> bool:
        """Whether take() can succeed now."""
        return (
            adapter.digest in self._residents
            or len(self._residents) < self._resident_max
            or any(not one.users for one in self._residents.values())
        )

    def take(self, adapter: Adapter) -> None:
        """Keeps an adapter in memory until give_back; loads it when it was dropped.

        Raises:
            AdapterUnusable: it had to be loaded, and its file is not usable any more.
        """
        self._use(adapter).users += 1

    def give_back(self, adapter: Adapter) -> None:
        """Ends one take; until then it was in use."""
        resident = self._residents.pop(adapter.digest)
        resident.users -= 1
        self._residents[adapter.digest] = resident

    def handle_of(self, digest: str) -> Handle:
        """The handle of an adapter that was taken."""
        return self._residents[digest].handle

    def _use(self, adapter: Adapter) -> _Resident:
        resident = self._residents.pop(adapter.digest, None)
        if resident is None:
            if adapter.path is None or not adapter.digest:
                raise AdapterUnusable(f"{adapter.name} has no file")
            self._loader.check_adapter(adapter)
            self._make_room()
            resident = _Resident(self._loader.load_adapter(adapter))
        self._residents[adapter.digest] = resident
        resident.names[adapter.name] = None
        if len(resident.names) > _NAMES_MAX:
            del resident.names[next(iter(resident.names))]
        return resident

    def _make_room(self) -> None:
        if len(self._residents) < self._resident_max:
            return
        digest = next(digest for digest, one in self._residents.items() if not one.users)
        self._loader.free_adapter(self._residents.pop(digest).handle)
