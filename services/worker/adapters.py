"""From the name of an adapter to one that the engine has loaded: found, checked, loaded."""

from __future__ import annotations

import asyncio
import hashlib
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import structlog
from maas.engine.v1 import engine_pb2

from libs.errors import FailedPrecondition, Reason
from services.worker.engine.base import Adapter, AdapterUnusable, Engine

log = structlog.get_logger(__name__)

# Files whose digests are known: more than any engine keeps loaded.
KNOWN_MAX = 1024


@dataclass(frozen=True, slots=True)
class _State:
    """What a file has to have kept for its digest to be the same."""

    path: Path
    size: int
    modified_ns: int
    inode: int


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
        reads_files: bool,
        threads: Executor,
        load_within_s: float,
    ) -> None:
        """Keeps what it needs.

        Args:
            engine: loads them.
            directory: where their files are; None for a worker that has none.
            reads_files: whether the engine needs a file.
            threads: where digests are made: large files take seconds, and prompts do not wait for
                them. One thread, so that a file is read once for all who wait.
            load_within_s: longest time that the engine may take.
        """
        self._engine = engine
        self._directory = directory
        self._reads_files = reads_files
        self._threads = threads
        self._load_within_s = load_within_s
        self._known: dict[_State, str] = {}

    @property
    def is_there(self) -> bool:
        """Whether there can be adapters at all."""
        return self._directory is not None or not self._reads_files

    async def ready(self, wanted: engine_pb2.AdapterRef) -> Adapter:
        """Returns an adapter that the engine has loaded.

        Raises:
            FailedPrecondition: it is missing, not what the catalog says, or not one of this model.
            EngineDied: the engine is gone.
        """
        path: Path | None = None
        if self._reads_files:
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
        """Finds a file and compares its digest. Runs in the thread."""
        try:
            path = self._find(wanted)
            digest = self._digest(path)
        # The latter is what links that lead to themselves raised before Python 3.13.
        except (OSError, RuntimeError) as error:
            cause = error.strerror if isinstance(error, OSError) else "links in a circle"
            log.warning("adapter unreadable", adapter=wanted.name, cause=cause)
            raise _unusable(wanted, "its file is missing or cannot be read") from None
        if digest != wanted.digest:
            raise _unusable(wanted, "its file has another digest than the catalog says")
        return path

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
        if not path.is_file():
            raise _unusable(wanted, "its path is not that of a file")
        return path

    def _digest(self, path: Path) -> str:
        """Returns "sha256:<hex>" of a file; reads it once as long as it does not change."""
        found = path.stat()
        state = _State(path, found.st_size, found.st_mtime_ns, found.st_ino)
        known = self._known.get(state)
        if known is None:
            with path.open("rb") as file:
                known = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
            if len(self._known) >= KNOWN_MAX:
                self._known.pop(next(iter(self._known)))
            self._known[state] = known
        return known


def _unusable(wanted: engine_pb2.AdapterRef, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{wanted.name} cannot be used: {why}",
        reason=Reason.ADAPTER_UNUSABLE,
        metadata={"adapter": wanted.name},
    )
