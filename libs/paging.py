"""Pages of lists: what a caller asks for, and how a full page is cut. The same in every service.

Pure. A store reads one item more than the page holds, from behind the last key of the page before;
`cut` tells from the extra item whether there is a next page. A page token is the last key, opaque
to callers; it holds no secret and grants nothing, so an invented one only moves the start.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from libs.errors import InvalidArgument, Reason
from libs.ids import last_part
from libs.limits import PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX, PUBLIC_REQUEST_BYTES_MAX

# Clients refuse responses over 4 MiB by default; the rest is for what stands around the items.
PAGE_BYTES_MAX = 3 * 1024 * 1024

assert PAGE_BYTES_MAX < PUBLIC_REQUEST_BYTES_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a caller asks for.

    Attributes:
        size: most items, 1 to PAGE_SIZE_MAX.
        after: key of the last item of the page before; empty for the first page.
    """

    size: int
    after: str

    @property
    def read_size(self) -> int:
        """How many items a store reads: one more than the page holds."""
        return self.size + 1


class Item(Protocol):
    """What pages hold: messages."""

    def ByteSize(self) -> int:  # noqa: N802 - protobuf's name
        """Size on the wire."""
        ...


class Named(Item, Protocol):
    """A resource, ordered by its name."""

    @property
    def name(self) -> str:
        """Resource name."""
        ...


ItemT = TypeVar("ItemT", bound=Item)
NamedT = TypeVar("NamedT", bound=Named)


def page_of(page_size: int, page_token: str) -> Page:
    """Reads `page_size` and `page_token` of a request: 50 when zero, 1000 at most.

    Raises:
        InvalidArgument: BAD_PAGE_TOKEN, the token is not one that `cut` made.
    """
    size = min(page_size, PAGE_SIZE_MAX) if page_size > 0 else PAGE_SIZE_DEFAULT
    return Page(size=size, after=_key_of_token(page_token) if page_token else "")


def cut(
    items: Sequence[ItemT], page: Page, key_of: Callable[[ItemT], str]
) -> tuple[Sequence[ItemT], str]:
    """Cuts what a store read to a page, by count and by bytes.

    Args:
        items: at most `page.read_size`, in order of their keys.
        page: what was asked for.
        key_of: key of an item, not empty; what `Page.after` will be for the next page.

    Returns:
        The items of the page, at least one if there is any, and the token of the next page, empty
        after the last.
    """
    count = 0
    size_bytes = 0
    for item in items[: page.size]:
        size_bytes += item.ByteSize()
        if count and size_bytes > PAGE_BYTES_MAX:
            break
        count += 1
    if count == len(items):
        return items, ""
    return items[:count], _token_of_key(key_of(items[count - 1]))


def cut_named(items: Sequence[NamedT], page: Page) -> tuple[Sequence[NamedT], str]:
    """Does what `cut` does, for resources in order of the last part of their names."""
    return cut(items, page, lambda item: last_part(item.name))


def _token_of_key(key: str) -> str:
    return base64.urlsafe_b64encode(key.encode("utf-8")).rstrip(b"=").decode("ascii")


def _key_of_token(token: str) -> str:
    try:
        padded = token.encode("ascii") + b"=" * (-len(token) % 4)
        key = base64.b64decode(padded, altchars=b"-_", validate=True).decode("utf-8")
    except (UnicodeError, binascii.Error):
        raise bad_page_token() from None
    # PostgreSQL stores no NUL; and only the one spelling that `cut` makes is accepted.
    if not key or "\0" in key or _token_of_key(key) != token:
        raise bad_page_token()
    return key


def bad_page_token() -> InvalidArgument:
    """Makes the error for a page token that this service has not made."""
    return InvalidArgument("page_token: is not one of ours", reason=Reason.BAD_PAGE_TOKEN)
