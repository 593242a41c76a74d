"""Files of a Hugging Face model directory: found, bounded, never followed out of it.

A link is followed inside the directory, and from a snapshot of Hugging Face's cache into the blobs
of the same repository (<repository>/snapshots/<revision>/<name> -> <repository>/blobs/<hash>). Any
other link that leads out is refused: the directory is what an operator chose, and its digest should
be that of what stands in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

if TYPE_CHECKING:
    # The engine's own Python has no libs.
    from libs.chat_rules import JsonObject, JsonValue

CONFIG_BYTES_MAX: Final = 16 << 20
TOKENIZER_BYTES_MAX: Final = 64 << 20
INDEX_BYTES_MAX: Final = 64 << 20
ENTRIES_MAX: Final = 4096
"""Most entries of a model directory; the largest models come in some hundred files."""


class HfFileError(Exception):
    """A file cannot be used. The message says which, why, and names no path but its name."""


def list_names(directory: Path) -> list[str]:
    """Returns the names of all entries but hidden ones, sorted by code point, as `ls` in C does.

    Raises:
        HfFileError: there is no such directory, or it has too many entries.
    """
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise HfFileError(f"the directory cannot be read: {error.strerror}") from None
    if len(names) > ENTRIES_MAX:
        raise HfFileError(f"the directory has more than {ENTRIES_MAX} entries")
    return [name for name in names if not name.startswith(".")]


def find_file(directory: Path, name: str) -> Path | None:
    """Returns where a file of the directory really is; None when there is none of this name.

    Raises:
        HfFileError: it is no regular file, or a link that leads out of the directory.
    """
    entry = directory / name
    try:
        if not entry.is_symlink() and not entry.exists():
            return None
        root = directory.resolve(strict=True)
        path = entry.resolve(strict=True)
    # The latter is what links that lead to themselves raised before Python 3.13.
    except (OSError, RuntimeError):
        raise HfFileError(f"{name} cannot be read, or is a link to nothing") from None
    if not path.is_relative_to(root) and path.parent != _blobs_of(root):
        raise HfFileError(f"{name} is a link that leads out of the directory: copy the file there")
    if not path.is_file():
        raise HfFileError(f"{name} is not a regular file")
    return path


def require_file(directory: Path, name: str) -> Path:
    """Does the same for a file that has to be there.

    Raises:
        HfFileError: likewise, and when there is none.
    """
    path = find_file(directory, name)
    if path is None:
        raise HfFileError(f"there is no {name}")
    return path


def read_text(directory: Path, name: str, bytes_max: int) -> str | None:
    """Returns a text file; None when there is none.

    Raises:
        HfFileError: it cannot be read, is longer than `bytes_max`, or is not UTF-8.
    """
    path = find_file(directory, name)
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            # One more, to tell whether there is more.
            data = file.read(bytes_max + 1)
    except OSError as error:
        raise HfFileError(f"{name} cannot be read: {error.strerror}") from None
    if len(data) > bytes_max:
        raise HfFileError(f"{name} is longer than {bytes_max} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise HfFileError(f"{name} is not UTF-8") from None


def read_json(directory: Path, name: str, bytes_max: int = CONFIG_BYTES_MAX) -> JsonObject | None:
    """Returns the JSON object that a file is; None when there is no such file.

    Raises:
        HfFileError: it cannot be read, is too long, or is no JSON object.
    """
    text = read_text(directory, name, bytes_max)
    return None if text is None else parse_object(text, name)


def require_json(directory: Path, name: str, bytes_max: int = CONFIG_BYTES_MAX) -> JsonObject:
    """Does the same for a file that has to be there.

    Raises:
        HfFileError: likewise, and when there is none.
    """
    found = read_json(directory, name, bytes_max)
    if found is None:
        raise HfFileError(f"there is no {name}")
    return found


def parse_object(text: str | bytes, name: str) -> JsonObject:
    """Returns the JSON object that a text is.

    Args:
        text: JSON.
        name: of where it comes from, for the error.

    Raises:
        HfFileError: it is none.
    """
    try:
        value = cast("JsonValue", json.loads(text))
    except (ValueError, RecursionError):
        raise HfFileError(f"{name} is no JSON") from None
    if not isinstance(value, dict):
        raise HfFileError(f"{name} is no JSON object")
    return value


def object_in(value: JsonValue | None) -> JsonObject:
    """Returns an object, or an empty one where there is none."""
    return value if isinstance(value, dict) else {}


def objects_in(value: JsonValue | None) -> list[JsonObject]:
    """Returns the objects in a list; none where there is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def text_in(value: JsonValue | None) -> str:
    """Returns a text, or an empty one where there is none."""
    return value if isinstance(value, str) else ""


def int_in(value: JsonValue | None) -> int | None:
    """Returns a whole number; None where there is none. JSON's true is no number."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _blobs_of(root: Path) -> Path | None:
    """Where a snapshot in Hugging Face's cache has its files; None for another directory."""
    return root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
