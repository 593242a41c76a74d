r"""The digest of a model directory, which anybody can compute with coreutils.

    cd DIRECTORY && LC_ALL=C ls | grep -E '\.(json|jinja|safetensors)$' \
        | xargs -d '\n' sha256sum -- | sha256sum

So it is the SHA-256 of what sha256sum prints for the files that an engine and its worker may load:
configurations, the tokenizer, chat templates, the weights and their index. Files of other kinds and
hidden ones are not read by anybody, and may come and go. For an adapter in a directory it is

    cd DIRECTORY && sha256sum adapter_config.json adapter_model.safetensors | sha256sum
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from services.worker.engine.base import EngineStartError
from services.worker.engine.hf_files import HfFileError, list_names, require_file

THREADS_MAX: Final = 4
BLOCK_BYTES: Final = 4 << 20
_LOADED: Final = (".json", ".jinja", ".safetensors")
# Others may have marks of their own in what sha256sum prints.
_NAME: Final = re.compile(r"[A-Za-z0-9._+=@,~ -]+")
# How often `tell` is called, at most: a hundred times.
_STEP: Final = 0.01


class DigestStopped(Exception):
    """It was told to stop before it was done."""


def digest_of(
    directory: Path, tell: Callable[[float], None], stop: threading.Event | None = None
) -> str:
    """Returns "sha256:<hex>" of a model directory; see above. Reads all of its weights.

    Args:
        directory: of the model.
        tell: gets the share of the bytes that have been read, 0..1, ascending; from threads of its
            own, one at a time.
        stop: ends it early, within a block.

    Raises:
        EngineStartError: a file cannot be read, or has a name that cannot be listed.
        DigestStopped: `stop` was set.
    """
    try:
        names = [name for name in list_names(directory) if name.endswith(_LOADED)]
        return digest_of_files(directory, names, tell, stop)
    except HfFileError as error:
        raise EngineStartError(f"{directory} has no digest: {error}") from None


def digest_of_files(
    directory: Path,
    names: Sequence[str],
    tell: Callable[[float], None],
    stop: threading.Event | None = None,
) -> str:
    """Does the same for some files of a directory, in this order.

    Raises:
        HfFileError: one cannot be read, or has a name that cannot be listed.
        DigestStopped: `stop` was set.
    """
    for name in names:
        if not _NAME.fullmatch(name):
            raise HfFileError(f"{name!r} is no plain name of a file: rename it")
    paths = [require_file(directory, name) for name in names]
    reader = _Reader(sum(path.stat().st_size for path in paths), tell, stop or threading.Event())
    # The largest first, so that no thread begins one when the others are done.
    rows = sorted(range(len(paths)), key=lambda row: -paths[row].stat().st_size)
    lines = [""] * len(paths)
    with ThreadPoolExecutor(THREADS_MAX, "digest") as pool:
        running = {row: pool.submit(reader.digest, paths[row], names[row]) for row in rows}
        try:
            for row, digest in running.items():
                lines[row] = f"{digest.result()}  {names[row]}\n"
        finally:
            # Where one has failed, the others need not go on.
            reader.end()
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


class _Reader:
    """Reads files in threads, and counts."""

    def __init__(self, size: int, tell: Callable[[float], None], stop: threading.Event) -> None:
        self._size = size
        self._tell = tell
        self._stop = stop
        self._is_over = False
        self._lock = threading.Lock()
        self._read = 0
        self._told = 0.0

    def end(self) -> None:
        """Makes the others stop."""
        self._is_over = True

    def digest(self, path: Path, name: str) -> str:
        """Returns the SHA-256 of a file, in hexadecimal digits.

        Raises:
            HfFileError: it cannot be read.
            DigestStopped: likewise.
        """
        hashed = hashlib.sha256()
        block = memoryview(bytearray(BLOCK_BYTES))
        try:
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(block):
                    if self._is_over or self._stop.is_set():
                        raise DigestStopped
                    hashed.update(block[:count])
                    self._count(count)
        except OSError as error:
            raise HfFileError(f"{name} cannot be read: {error.strerror}") from None
        return hashed.hexdigest()

    def _count(self, count: int) -> None:
        with self._lock:
            self._read += count
            # Files may have grown since they were measured.
            share = min(1.0, self._read / self._size)
            if share >= self._told + _STEP or share == 1.0 > self._told:
                self._told = share
                self._tell(share)
