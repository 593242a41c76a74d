"""The digest of a model that is one file: "sha256:<hex>" of its bytes, as sha256sum prints it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from services.worker.engine.base import EngineStartError

# Several blocks in a second: so often progress is told.
_BLOCK_BYTES: Final = 1 << 26


def digest_of_file(path: Path, tell: Callable[[float], None] | None = None) -> str:
    """Reads a whole file. May run on any thread; others run meanwhile.

    Args:
        path: of the file.
        tell: gets the share that was read, 0..1, block by block.

    Raises:
        EngineStartError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        size = max(path.stat().st_size, 1)
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                if tell is not None:
                    tell(min(file.tell() / size, 1.0))
    except OSError as error:
        raise EngineStartError(f"the model file cannot be read: {error}") from error
    return f"sha256:{digest.hexdigest()}"


def require_digest(path: Path, expected: str, tell: Callable[[float], None] | None = None) -> None:
    """Sees that a file is the one that is wanted, before native code reads any of it.

    Args:
        path: of the file.
        expected: digest that it has to have.
        tell: as in `digest_of_file`.

    Raises:
        EngineStartError: it has another one, or cannot be read.
    """
    digest = digest_of_file(path, tell)
    if digest != expected:
        raise EngineStartError(
            f"{path} has digest {digest} and {expected} is expected: put the right file there, or"
            " correct worker.digest or worker.model_version"
        )
