"""Everything billing keeps: the only place with its SQL. One method is one transaction.

Locks are taken in one order by everybody: the ledger's head, then balances by account id. A credit
slice is changed only under the lock of its account's balance, so slices need no locks of their own.
"""

from __future__ import annotations

from services.billing.store.accounts import AccountStore
from services.billing.store.grants import GrantStore
from services.billing.store.prices import PriceStore
from services.billing.store.refunds import RefundStore
from services.billing.store.settlements import Settled, SettlementStore
from services.billing.store.slices import SliceStore, SliceWish

__all__ = [
    "AccountStore",
    "GrantStore",
    "PriceStore",
    "RefundStore",
    "Settled",
    "SettlementStore",
    "SliceStore",
    "SliceWish",
]
