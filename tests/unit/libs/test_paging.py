"""libs/paging.py: pages of lists."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import pytest
from google.protobuf import descriptor_pb2
from hypothesis import given
from hypothesis import strategies as st
from maas.catalog.v1 import model_pb2

from libs.errors import InvalidArgument, Reason
from libs.limits import PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX
from libs.paging import PAGE_BYTES_MAX, Page, cut, cut_named, page_of

keys = st.text(min_size=1, max_size=40).filter(
    lambda key: "\0" not in key and "/" not in key and key.isprintable()
)


def read(names: Sequence[str], page: Page) -> list[model_pb2.Model]:
    """Does what a store does."""
    behind = [name for name in sorted(names) if name > page.after]
    return [model_pb2.Model(name=f"models/{name}") for name in behind[: page.read_size]]


@given(st.sets(keys, max_size=30), st.integers(1, 10))
def test_pages_hold_everything_once_in_order(names: set[str], size: int) -> None:
    got: list[str] = []
    token = ""
    for _ in range(len(names) // size + 1):
        page = page_of(size, token)
        items, token = cut_named(read(sorted(names), page), page)
        assert len(items) <= size
        got += [item.name.removeprefix("models/") for item in items]
        if not token:
            break

    assert got == sorted(names)
    assert token == ""


@pytest.mark.parametrize(
    ("asked", "want"),
    [
        (0, PAGE_SIZE_DEFAULT),
        (-1, PAGE_SIZE_DEFAULT),
        (1, 1),
        (1000, 1000),
        (1001, PAGE_SIZE_MAX),
        (2**31 - 1, PAGE_SIZE_MAX),
    ],
)
def test_size_is_coerced(asked: int, want: int) -> None:
    assert page_of(asked, "").size == want


@pytest.mark.parametrize(
    "token",
    [
        "!",
        "a",
        "YQ==",
        "YR",
        "é",
        " YQ",
        "YQ\n",
        base64.urlsafe_b64encode(b"\0").decode().rstrip("="),
        base64.urlsafe_b64encode(b"\xff\xfe").decode().rstrip("="),
    ],
    ids=[
        "alphabet",
        "length",
        "padding",
        "spare bits",
        "not ASCII",
        "space",
        "line end",
        "NUL",
        "not UTF-8",
    ],
)
def test_token_that_no_page_gave_is_refused(token: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        page_of(0, token)

    assert caught.value.reason is Reason.BAD_PAGE_TOKEN


def test_page_is_cut_by_bytes_before_clients_refuse_it() -> None:
    items = [model_pb2.Model(name=f"models/{n:04}", description="d" * 65536) for n in range(100)]
    page = page_of(99, "")

    got, token = cut_named(items, page)

    assert 40 < len(got) < 48
    assert sum(item.ByteSize() for item in got) <= PAGE_BYTES_MAX
    assert page_of(0, token).after == got[-1].name.removeprefix("models/")


def test_item_larger_than_a_page_stands_alone() -> None:
    large = model_pb2.Model(name="models/a", description="d" * (PAGE_BYTES_MAX + 1))
    items = [large, model_pb2.Model(name="models/b")]

    got, token = cut_named(items, page_of(10, ""))

    assert list(got) == [large]
    assert page_of(0, token).after == "a"


def test_key_may_be_anything_that_orders_the_list() -> None:
    items = [descriptor_pb2.UninterpretedOption(positive_int_value=n) for n in range(3)]

    got, token = cut(items, page_of(2, ""), lambda item: f"{item.positive_int_value:020}")

    assert list(got) == items[:2]
    assert page_of(0, token).after == f"{1:020}"


def test_empty_list_is_one_empty_page() -> None:
    assert cut_named([], page_of(0, "")) == ([], "")
