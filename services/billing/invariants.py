"""What always holds of the ledger, as data: the auditor names what it finds by these ids.

Pure: no gRPC, no SQL, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Invariant:
    """Something that holds at every moment.

    Attributes:
        invariant_id: "I1" to "I12".
        sentence: what holds.
        outside: the part of it that billing cannot see, and who can; empty when it sees all.
    """

    invariant_id: str
    sentence: str
    outside: str = ""


INVARIANTS = (
    Invariant(
        invariant_id="I1",
        sentence="All ledger entries sum to zero, and so do those of each movement; their numbers "
        "have no gaps.",
    ),
    Invariant(
        invariant_id="I2",
        sentence="What an account has posted is the sum of its entries; its grants have that much "
        "left, or nothing while it is below zero, and each grant is as its entry gave it.",
    ),
    Invariant(
        invariant_id="I3",
        sentence="What an account has held is what its open and expired slices have left; windows "
        "of spend limits likewise, and an account that has such limits knows it.",
    ),
    Invariant(
        invariant_id="I4",
        sentence="No account is below its floor, and no floor is above the credit limit.",
    ),
    Invariant(
        invariant_id="I5",
        sentence="There is one usage record for each generation, their numbers have no gaps, and "
        "each is on one invoice that counts, at most.",
    ),
    Invariant(
        invariant_id="I6",
        sentence="No slice is consumed beyond what was granted, and no charge is refunded beyond "
        "what was taken.",
    ),
    Invariant(
        invariant_id="I7",
        sentence="Each usage record has the ledger entries that it says, each charge and each "
        "refund in the ledger has its record.",
        outside="That each generation that a gateway has opened is settled: its journal keeps it "
        "until it is.",
    ),
    Invariant(
        invariant_id="I8",
        sentence="Each receipt verifies with a known key and says what its usage record says, and "
        "none had to be refused.",
        outside="That the client received what the receipt says: the client counts.",
    ),
    Invariant(
        invariant_id="I9",
        sentence="Counts are not negative, and no part is more than its whole.",
        outside="That a worker generated at least what was released: the worker counts.",
    ),
    Invariant(
        invariant_id="I10",
        sentence="The amount of a usage record is what its counts cost at its price, and zero "
        "where the end was not the client's.",
    ),
    Invariant(
        invariant_id="I11",
        sentence="No slice holds money longer than its lease and the grace.",
    ),
    Invariant(
        invariant_id="I12",
        sentence="Sums agree with what they sum: invoices and windows of spend limits with usage "
        "records and refunds.",
        outside="That metrics agree with the records: whoever reads both.",
    ),
)
