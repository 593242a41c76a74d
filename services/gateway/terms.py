"""What one generation was agreed on, and when."""

from __future__ import annotations

from dataclasses import dataclass

from services.gateway.domain import Price
from services.gateway.quotas import Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Monotonic seconds of one generation.

    Attributes:
        arrived_s: the call.
        accepted_s: the worker's acceptance.
    """

    arrived_s: float
    accepted_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What was agreed on.

    Attributes:
        price: frozen at admission.
        max_output_tokens: of all outputs together; never exceeded.
        seed: in use.
        with_ids: readers get token ids.
        lives_on: it goes on without a reader.
        is_kept: its log stays for the replay window.
        is_unary: the answer is the whole result.
        is_exact: another worker can go on behind output that was released. Not where outputs,
            parsers or constraints have a state that token ids alone do not bring back.
        quota: taken of rate limits; None where none applies.
    """

    price: Price
    max_output_tokens: int
    seed: int
    with_ids: bool
    lives_on: bool
    is_kept: bool
    is_unary: bool
    is_exact: bool
    quota: Ticket | None = None
