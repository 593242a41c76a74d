"""From the name of an adapter to one that the engine has loaded: found, checked, loaded."""

from __future__ import annotations

import asyncio
import enum
import hashlib
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import structlog
from maas.engine.v1 import engine_pb2

from libs.errors import FailedPrecondition, Reason
from services.worker.engine.base import Adapter, AdapterUnusable, Engine
from services.worker.engine.hf_adapter import CONFIG_FILE, WEIGHTS_FILE, adapter_digest

log = structlog.get_logger(__name__)
T = TypeVar("T")

# Adapters whose digests are known: more than any engine keeps loaded.
KNOWN_MAX = 1024


class AdapterForm(enum.Enum):
    """What an engine reads of an adapter."""

    NONE = "none"
    FILE = "file"
    DIRECTORY = "directory"


Check = Callable[[Path], object]
"""Compares an adapter with the model. Raises AdapterUnusable; reads no weights."""


@dataclass(frozen=True, slots=True)
class _FileState:
    """What a file has to have kept for its digest to be the same."""

    path: Path
    size: int
    modified_ns: int
    inode: int


_State = tuple[_FileState, ...]


class Adapters:
    """The adapters that executions may ask for. Belongs to one event loop.

    A file is read only inside the configured directory, whatever the catalog says of it, and is
    used only while its digest is the one in the catalog.
    """

    def __init__(
        self,
        engine: Engine,
        directory: Path | None,
        *,
        form: AdapterForm,
        threads: Executor,
        load_within_s: float,
        check: Check | None = None,
    ) -> None:
        """Keeps what it needs.

        Args:
            engine: loads them.
            directory: where they are; None for a worker that has none.
            form: what the engine reads.
            threads: where digests are made: large files take seconds, and prompts do not wait for
                them. One thread, so that a file is read once for all who wait.
            load_within_s: longest time that the engine may take.
            check: sees that an adapter fits the model, before the engine sees it; runs in the
                thread, once for as long as the adapter does not change. None where the engine
                itself can be trusted to.
        """
        self._engine = engine
        self._directory = directory
        self._form = form
        self._threads = threads
        self._load_within_s = load_within_s
        self._check = check
        self._known: dict[_State, str] = {}
        self._fitting: dict[_State, None] = {}

    @property
    def is_there(self) -> bool:
        """Whether there can be adapters at all."""
        return self._directory is not None or self._form is AdapterForm.NONE

    async def ready(self, wanted: engine_pb2.AdapterRef) -> Adapter:
        """Returns an adapter that the engine has loaded.

        Raises:
            FailedPrecondition: it is missing, not what the catalog says, or not one of this model.
            EngineDied: the engine is gone.
        """
        path: Path | None = None
        if self._form is not AdapterForm.NONE:
            loop = asyncio.get_running_loop()
            path = await loop.run_in_executor(self._threads, self._checked, wanted)
        adapter = Adapter(name=wanted.name, path=path, digest=wanted.digest)
        try:
            async with asyncio.timeout(self._load_within_s):
                await self._engine.load_adapter(adapter)
        except AdapterUnusable as error:
            raise _unusable(wanted, str(error)) from error
        except TimeoutError:
            raise _unusable(wanted, f"did not load within {self._load_within_s:g} s") from None
        return adapter

    def _checked(self, wanted: engine_pb2.AdapterRef) -> Path:
        """Finds an adapter, compares its digest and sees that it fits. Runs in the thread."""
        try:
            path = self._find(wanted)
            state = self._state(path)
            digest = self._digest(path, state)
        # The latter is what links that lead to themselves raised before Python 3.13.
        except (OSError, RuntimeError) as error:
            cause = error.strerror if isinstance(error, OSError) else "links in a circle"
            log.warning("adapter unreadable", adapter=wanted.name, cause=cause)
            raise _unusable(
                wanted, f"its {self._form.value} is missing or cannot be read"
            ) from None
        except AdapterUnusable as error:
            raise _unusable(wanted, str(error)) from None
        if digest != wanted.digest:
            raise _unusable(
                wanted, f"its {self._form.value} has another digest than the catalog says"
            )
        self._require_fit(wanted, path, state)
        return path

    def _require_fit(self, wanted: engine_pb2.AdapterRef, path: Path, state: _State) -> None:
        if self._check is None or state in self._fitting:
            return
        try:
            self._check(path)
        except AdapterUnusable as error:
            raise _unusable(wanted, str(error)) from None
        _remember(self._fitting, state, None)

    def _find(self, wanted: engine_pb2.AdapterRef) -> Path:
        """Resolves a path, strictly inside the directory: links that lead out of it too.

        Raises:
            OSError: there is no such file.
        """
        if self._directory is None:
            raise _unusable(wanted, "this worker has no directory of adapters")
        relative = Path(wanted.path)
        if relative.is_absolute() or ".." in relative.parts or "\0" in wanted.path:
            raise _unusable(wanted, "its path leads out of the directory of adapters")
        directory = self._directory.resolve(strict=True)
        path = (directory / relative).resolve(strict=True)
        if not path.is_relative_to(directory):
            raise _unusable(wanted, "its path leads out of the directory of adapters")
        if self._form is AdapterForm.DIRECTORY and not path.is_dir():
            raise _unusable(wanted, "its path is not that of a directory")
        if self._form is AdapterForm.FILE and not path.is_file():
            raise _unusable(wanted, "its path is not that of a file")
        return path

    def _state(self, path: Path) -> _State:
        """Returns what the files of an adapter have to keep.

        Raises:
            OSError: one of them is missing.
        """
        if self._form is AdapterForm.DIRECTORY:
            return tuple(_state_of(path / name) for name in (CONFIG_FILE, WEIGHTS_FILE))
        return (_state_of(path),)

    def _digest(self, path: Path, state: _State) -> str:
        """Returns "sha256:<hex>" of an adapter; reads it once as long as it does not change."""
        known = self._known.get(state)
        if known is None:
            if self._form is AdapterForm.DIRECTORY:
                known = adapter_digest(path)
            else:
                with path.open("rb") as file:
                    known = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
            _remember(self._known, state, known)
        return known


def _state_of(path: Path) -> _FileState:
    found = path.stat()
    return _FileState(path, found.st_size, found.st_mtime_ns, found.st_ino)


def _remember(known: dict[_State, T], state: _State, value: T) -> None:
    if len(known) >= KNOWN_MAX:
        known.pop(next(iter(known)))
    known[state] = value


def _unusable(wanted: engine_pb2.AdapterRef, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{wanted.name} cannot be used: {why}",
        reason=Reason.ADAPTER_UNUSABLE,
        metadata={"adapter": wanted.name},
    )
