"""What the tokens of a Hugging Face vocabulary spell in bytes, by the decoder in tokenizer.json.

The library's own decoder makes text of whole outputs: it replaces bytes that are no characters, and
drops the space before the first word. Here each token has its bytes whatever stands around it, so
those of an output, put together, are its text: an output that goes on behind a prompt begins with
the space that stands between them. Hence the decoder's steps that look at the whole output (Fuse,
Strip at the beginning) have nothing to do.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Protocol

from services.worker.engine.hf_files import HfFileError, object_in, objects_in, text_in

if TYPE_CHECKING:
    # The engine's own Python has no libs.
    from libs.chat_rules import JsonObject, JsonValue

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MARK: Final = "\N{LOWER ONE EIGHTH BLOCK}"


class Speller(Protocol):
    """Turns the text of a token in tokenizer.json into what it spells."""

    def spell(self, text: str, *, is_added: bool) -> bytes:
        """Returns UTF-8, possibly part of a character.

        Args:
            text: of the token, as the file has it.
            is_added: it is an added token, whose text is no spelling.
        """
        ...


def speller_of(decoder: JsonValue | None) -> Speller:
    """Returns the speller that a decoder asks for.

    Args:
        decoder: of tokenizer.json.

    Raises:
        HfFileError: it is none that is understood here; names it.
    """
    steps = list(_steps_of(object_in(decoder)))
    kinds = [text_in(step.get("type")) for step in steps]
    if "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}:
        return _ByteSpeller()
    if "Metaspace" in kinds or "Replace" in kinds:
        return _MarkSpeller(steps)
    named = ", ".join(kind or "unknown" for kind in kinds) or "none"
    raise HfFileError(
        f"tokenizer.json has a decoder that is not supported ({named}); ByteLevel and "
        "SentencePiece's Metaspace or Replace are"
    )


def byte_characters() -> dict[str, int]:
    """Returns the byte that each character stands for in byte-level BPE.

    Printable characters of Latin-1 stand for themselves; the other bytes, in their order, have the
    characters from U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(0x100) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(0x100 + row): byte for row, byte in enumerate(hidden)
    }


class _ByteSpeller:
    """Byte-level BPE: a character for each byte."""

    def __init__(self) -> None:
        self._bytes = byte_characters()

    def spell(self, text: str, *, is_added: bool) -> bytes:
        if not is_added:
            try:
                return bytes([self._bytes[character] for character in text])
            except KeyError:
                pass
        return _utf8(text)


class _MarkSpeller:
    """SentencePiece: a mark for each space, tokens for single bytes. Added tokens likewise."""

    def __init__(self, steps: list[JsonObject]) -> None:
        self._has_bytes = False
        self._replaced: list[tuple[str, str]] = []
        is_fused = False
        for step in steps:
            kind = text_in(step.get("type"))
            match kind:
                case "ByteFallback":
                    self._has_bytes = True
                case "Metaspace":
                    self._replaced.append((text_in(step.get("replacement")) or _MARK, " "))
                case "Replace" if not is_fused:
                    self._replaced.append(_replacement_of(step))
                case "Fuse":
                    is_fused = True
                case "Strip" if step.get("content") == " " and not step.get("stop"):
                    pass
                case _:
                    raise HfFileError(f"tokenizer.json has a decoder's {kind} that is unsupported")

    def spell(self, text: str, *, is_added: bool) -> bytes:
        del is_added
        found = _BYTE_TOKEN.fullmatch(text) if self._has_bytes else None
        if found is not None:
            return bytes([int(found[1], 16)])
        for pattern, content in self._replaced:
            text = text.replace(pattern, content)
        return _utf8(text)


def _steps_of(decoder: JsonObject) -> list[JsonObject]:
    """Returns the steps of a decoder; sequences are not nested by anybody."""
    if not decoder:
        return []
    if decoder.get("type") == "Sequence":
        return objects_in(decoder.get("decoders"))
    return [decoder]


def _replacement_of(step: JsonObject) -> tuple[str, str]:
    pattern = text_in(object_in(step.get("pattern")).get("String"))
    if not pattern:
        raise HfFileError("tokenizer.json has a decoder that replaces a regular expression")
    return pattern, text_in(step.get("content"))


def _utf8(text: str) -> bytes:
    # JSON may spell half of a character, which has no UTF-8.
    return text.encode("utf-8", "replace")
