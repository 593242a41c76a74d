"""Which usage is asked for, how it is grouped, and the sums of it.

Pure: no gRPC, no SQL, no clock. Amounts are nanos of USD.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from libs.paging import bad_page_token


class Dimension(enum.Enum):
    """What usage is grouped by; the values are those of maas.billing.v1.UsageDimension."""

    DAY = 1
    PROJECT = 2
    API_KEY = 3
    OFFERING = 4
    MODEL_VERSION = 5
    PRICE = 6
    LABEL = 7
    END_CAUSE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageFilter:
    """Lets records through that agree with all that is set. Ids are the parts of names.

    Attributes:
        project_id: who called; empty for all. So are the next two.
        api_key_id: with which key.
        offering_id: what was called.
        model_version: ids of the model and of its version that served; None for all.
        labels: all of these, with these values.
        end_user: the client's own id; empty for all.
        start_time: settled then or later; None for all.
        end_time: settled before; None for all.
    """

    project_id: str = ""
    api_key_id: str = ""
    offering_id: str = ""
    model_version: tuple[str, str] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    end_user: str = ""
    start_time: datetime | None = None
    end_time: datetime | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it lets every record through."""
        return self == UsageFilter()


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """How usage is grouped.

    Attributes:
        dimensions: each at most once; all usage is one group when there are none.
        label_key: whose value Dimension.LABEL is; empty without it.
    """

    dimensions: tuple[Dimension, ...] = ()
    label_key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageSummary:
    """Sums over a group of records.

    Attributes:
        values: of the dimensions asked for, in their order.
        record_count: how many records.
        input_tokens: of prompts, cached ones among them.
        cached_input_tokens: part of them that the prefix cache had.
        output_tokens: released, reasoning among them.
        reasoning_tokens: part of them that is reasoning.
        charge: what was taken from the account.
        refunded: what was given back of that.
        engine_time_us: share of engines' time, microseconds.
        engine_cost: what that time cost the operator; each record's rounded up.
    """

    values: tuple[str, ...]
    record_count: int
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    reasoning_tokens: int
    charge: int
    refunded: int
    engine_time_us: int
    engine_cost: int


def key_of_values(values: Sequence[str]) -> str:
    """Writes the values of a group as one text: the key that the next page starts behind."""
    return "".join(f"{len(value)}:{value}" for value in values)


def values_of_key(key: str, count: int) -> tuple[str, ...]:
    """Reads what `key_of_values` has written.

    Raises:
        InvalidArgument: BAD_PAGE_TOKEN, it is not the key of that many values.
    """
    values: list[str] = []
    rest = key
    while rest:
        length, colon, rest = rest.partition(":")
        # Labels are the longest, and far below a thousand characters.
        is_length = length.isascii() and length.isdecimal() and len(length) <= len("999")
        if not (colon and is_length) or len(rest) < int(length):
            raise bad_page_token()
        values.append(rest[: int(length)])
        rest = rest[int(length) :]
    if len(values) != count or not values:
        raise bad_page_token()
    return tuple(values)
