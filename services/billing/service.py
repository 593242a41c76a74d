"""Billing's methods: parse, one call of a store, build.

Tenants reach their own organization's account and no other: whatever else they name is NOT_FOUND,
whether it is there or not.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from google.protobuf.duration_pb2 import Duration
from maas.billing.v1 import account_service_pb2 as account_pb
from maas.billing.v1 import (
    account_service_pb2_grpc,
    credit_slice_service_pb2_grpc,
    price_service_pb2_grpc,
)
from maas.billing.v1 import credit_slice_service_pb2 as slice_pb
from maas.billing.v1 import price_service_pb2 as price_pb
from typing_extensions import override

from libs import paging
from libs.auth import Role
from libs.clock import Clock
from libs.errors import FieldRule, invalid_field, not_found
from libs.limits import WATCH_BOOKMARK_S
from libs.rpc import Hub, current_call
from libs.rpc.feed import changes
from services.billing import convert, grant_convert, price_convert
from services.billing.domain import account_name
from services.billing.store import (
    AccountStore,
    GrantStore,
    PriceStore,
    RefundStore,
    SettlementStore,
    SliceStore,
    SliceWish,
)

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]

ALL_ACCOUNTS = "accounts/-"


class AccountService(account_service_pb2_grpc.AccountServiceServicer):
    """Accounts and the ledger: maas.billing.v1.AccountService.

    Args:
        store: where accounts are kept.
        grants: where their grants are.
        refunds: where charges are given back.
        clock: time of records; grants expire on the clock of the database.
    """

    def __init__(
        self, store: AccountStore, grants: GrantStore, refunds: RefundStore, clock: Clock
    ) -> None:
        self._store = store
        self._grants = grants
        self._refunds = refunds
        self._clock = clock

    @override
    async def CreateAccount(
        self, request: account_pb.CreateAccountRequest, _: Context
    ) -> account_pb.CreateAccountResponse:
        """Creates a customer's account."""
        wanted = convert.account_from_pb(request, self._clock.now())
        account = await self._store.create_account(wanted)
        return account_pb.CreateAccountResponse(account=convert.account_to_pb(account))

    @override
    async def GetAccount(
        self, request: account_pb.GetAccountRequest, _: Context
    ) -> account_pb.GetAccountResponse:
        """Reads an account."""
        account = await self._store.get_account(reachable_account(request.name, "name"))
        return account_pb.GetAccountResponse(account=convert.account_to_pb(account))

    @override
    async def ListAccounts(
        self, request: account_pb.ListAccountsRequest, _: Context
    ) -> account_pb.ListAccountsResponse:
        """Lists accounts by name, those of the ledger included."""
        page = paging.page_of(request.page_size, request.page_token)
        accounts = await self._store.list_accounts(page)
        items, token = paging.cut_named([convert.account_to_pb(item) for item in accounts], page)
        return account_pb.ListAccountsResponse(accounts=items, next_page_token=token)

    @override
    async def PostEntry(
        self, request: account_pb.PostEntryRequest, _: Context
    ) -> account_pb.PostEntryResponse:
        """Moves money between an account and system-funding."""
        posting = convert.posting_from_pb(request)
        entry = await self._store.post_entry(posting, self._clock.now())
        return account_pb.PostEntryResponse(entry=convert.entry_to_pb(entry))

    @override
    async def CreateGrant(
        self, request: account_pb.CreateGrantRequest, _: Context
    ) -> account_pb.CreateGrantResponse:
        """Gives credit that may expire."""
        now = self._clock.now()
        grant = await self._grants.create_grant(grant_convert.grant_from_pb(request, now), now)
        return account_pb.CreateGrantResponse(grant=grant_convert.grant_to_pb(grant))

    @override
    async def ListGrants(
        self, request: account_pb.ListGrantsRequest, _: Context
    ) -> account_pb.ListGrantsResponse:
        """Lists the grants of an account in the order in which they are used up."""
        page = paging.page_of(request.page_size, request.page_token)
        account_id = reachable_account(request.parent, "parent")
        found = await self._grants.list_grants(account_id, page, show_all=request.show_all)
        keys = {grant.name: key for key, grant in found}
        items, token = paging.cut(
            [grant_convert.grant_to_pb(grant) for _, grant in found],
            page,
            lambda item: keys[item.name],
        )
        return account_pb.ListGrantsResponse(grants=items, next_page_token=token)

    @override
    async def SetCreditLimit(
        self, request: account_pb.SetCreditLimitRequest, _: Context
    ) -> account_pb.SetCreditLimitResponse:
        """Says how far an account may go below zero."""
        account = await self._store.set_credit_limit(
            grant_convert.customer_id_of(request.account, "account"),
            grant_convert.credit_limit_from_pb(request),
        )
        return account_pb.SetCreditLimitResponse(account=convert.account_to_pb(account))

    @override
    async def RefundUsage(
        self, request: account_pb.RefundUsageRequest, _: Context
    ) -> account_pb.RefundUsageResponse:
        """Gives back what a generation cost, or a part of it."""
        wish = grant_convert.refund_from_pb(request)
        entry = await self._refunds.refund(wish, self._clock.now())
        return account_pb.RefundUsageResponse(entry=convert.entry_to_pb(entry))

    @override
    async def GetBalance(
        self, request: account_pb.GetBalanceRequest, _: Context
    ) -> account_pb.GetBalanceResponse:
        """Reads the money of an account."""
        account_id = reachable_account(request.account, "account")
        balance = await self._store.get_balance(account_id)
        return account_pb.GetBalanceResponse(
            account=account_name(account_id), balance=convert.balance_to_pb(balance)
        )

    @override
    async def ListLedgerEntries(
        self, request: account_pb.ListLedgerEntriesRequest, _: Context
    ) -> account_pb.ListLedgerEntriesResponse:
        """Lists ledger entries, oldest first."""
        page = paging.page_of(request.page_size, request.page_token)
        account_id = None
        if request.parent != ALL_ACCOUNTS or not is_administrator():
            account_id = reachable_account(request.parent, "parent")
        entries = await self._store.list_entries(account_id, page)
        items, token = paging.cut_named([convert.entry_to_pb(item) for item in entries], page)
        return account_pb.ListLedgerEntriesResponse(entries=items, next_page_token=token)


class PriceService(price_service_pb2_grpc.PriceServiceServicer):
    """The price book: maas.billing.v1.PriceService.

    Args:
        store: where prices are kept.
        hub: wakes watchers when there is a new price.
        clock: time of records.
        bookmark_s: longest time between two responses of a watch.
    """

    def __init__(
        self,
        store: PriceStore,
        hub: Hub,
        clock: Clock,
        *,
        bookmark_s: float = WATCH_BOOKMARK_S,
    ) -> None:
        self._store = store
        self._hub = hub
        self._clock = clock
        self._bookmark_s = bookmark_s

    @override
    async def CreatePrice(
        self, request: price_pb.CreatePriceRequest, _: Context
    ) -> price_pb.CreatePriceResponse:
        """Creates a price, which never changes afterwards."""
        wanted = price_convert.price_from_pb(request.price_id, request.price, self._clock.now())
        price = await self._store.create_price(wanted)
        self._hub.poke()
        return price_pb.CreatePriceResponse(price=price_convert.price_to_pb(price, with_cost=True))

    @override
    async def GetPrice(
        self, request: price_pb.GetPriceRequest, _: Context
    ) -> price_pb.GetPriceResponse:
        """Reads a price."""
        price = await self._store.get_price(convert.price_id_of(request.name, "name"))
        return price_pb.GetPriceResponse(
            price=price_convert.price_to_pb(price, with_cost=is_administrator())
        )

    @override
    async def ListPrices(
        self, request: price_pb.ListPricesRequest, _: Context
    ) -> price_pb.ListPricesResponse:
        """Lists prices by name."""
        page = paging.page_of(request.page_size, request.page_token)
        offering_id = ""
        if request.offering:
            offering_id = convert.offering_id_of(request.offering, "offering")
        prices = await self._store.list_prices(offering_id, page)
        with_cost = is_administrator()
        items, token = paging.cut_named(
            [price_convert.price_to_pb(item, with_cost=with_cost) for item in prices], page
        )
        return price_pb.ListPricesResponse(prices=items, next_page_token=token)

    @override
    async def WatchPrices(
        self, _request: price_pb.WatchPricesRequest, _: Context
    ) -> AsyncGenerator[price_pb.WatchPricesResponse, None]:
        """Streams every price, then each new one, then signs of life."""
        read_after = self._store.list_prices_after
        async with aclosing(changes(self._hub, read_after, bookmark_s=self._bookmark_s)) as feed:
            async for item in feed:
                yield price_pb.WatchPricesResponse(
                    prices=[
                        price_convert.price_to_pb(price, with_cost=False) for price in item.items
                    ],
                    snapshot_complete=item.completes_snapshot,
                )


class CreditSliceService(credit_slice_service_pb2_grpc.CreditSliceServiceServicer):
    """Credit slices and settlement: maas.billing.v1.CreditSliceService.

    Args:
        slices: where slices are kept.
        settlements: where usage is kept.
        clock: time of records; leases run on the clock of the database.
        lease_s: how long a slice may be spent from.
    """

    def __init__(
        self, slices: SliceStore, settlements: SettlementStore, clock: Clock, *, lease_s: float
    ) -> None:
        self._slices = slices
        self._settlements = settlements
        self._clock = clock
        self._lease = Duration()
        self._lease.FromNanoseconds(round(lease_s * 1e9))

    @override
    async def AcquireSlice(
        self, request: slice_pb.AcquireSliceRequest, _: Context
    ) -> slice_pb.AcquireSliceResponse:
        """Sets money aside for a gateway."""
        wish = SliceWish(
            slice_id=convert.text_of(request.slice_id, "slice_id"),
            account_id=convert.account_id_of(request.account, "account"),
            holder=convert.text_of(request.holder, "holder"),
            required=request.required_nanos,
            wanted=request.wanted_nanos,
            project_id=(
                convert.project_id_of(request.project, "project") if request.project else ""
            ),
            api_key_id=(
                convert.ids_of(request.api_key, "apiKeys/*", "api_key")[0]
                if request.api_key
                else ""
            ),
        )
        acquired = await self._slices.acquire(wish, self._clock.now())
        lease = self._lease
        if acquired.lease is not None:
            lease = Duration()
            lease.FromTimedelta(acquired.lease)
        return slice_pb.AcquireSliceResponse(granted_nanos=acquired.granted, lease_duration=lease)

    @override
    async def Settle(self, request: slice_pb.SettleRequest, _: Context) -> slice_pb.SettleResponse:
        """Settles generations and renews leases."""
        settled = await self._settlements.settle(
            convert.settlements_from_pb(request.settlements),
            convert.texts_of(request.renew_slice_ids, "renew_slice_ids"),
            self._clock.now(),
        )
        return slice_pb.SettleResponse(
            settled_count=settled.new_count,
            lost_slice_ids=settled.lost_slice_ids,
            lease_duration=self._lease,
        )

    @override
    async def FindSettlement(
        self, request: slice_pb.FindSettlementRequest, _: Context
    ) -> slice_pb.FindSettlementResponse:
        """Finds what was charged under an idempotency key."""
        found = await self._settlements.find_charged(
            convert.project_id_of(request.project, "project"),
            convert.text_of(request.request_id, "request_id"),
        )
        if found is None:
            return slice_pb.FindSettlementResponse()
        return slice_pb.FindSettlementResponse(
            usage_record=convert.record_to_pb(found),
            request_sha256=found.settlement.request_sha256,
        )

    @override
    async def CloseSlices(
        self, request: slice_pb.CloseSlicesRequest, _: Context
    ) -> slice_pb.CloseSlicesResponse:
        """Gives the rest of slices back."""
        await self._slices.close(
            convert.texts_of(request.slice_ids, "slice_ids"),
            holder=convert.text_of(request.holder, "holder"),
        )
        return slice_pb.CloseSlicesResponse()


def is_administrator() -> bool:
    """Tells whether the caller may see every account."""
    return current_call().require_principal().role is Role.ADMINISTRATOR


def reachable_account(name: str, field: str) -> str:
    """Returns the id of the account that the caller names; a tenant's own when it names none.

    Raises:
        InvalidArgument: the name has another form, or an administrator names none.
        NotFound: it is not the tenant's own.
    """
    if is_administrator():
        if not name:
            raise invalid_field(field, FieldRule.REQUIRED, "must not be empty")
        return convert.account_id_of(name, field)
    own = current_call().require_principal().organization
    if name and name != account_name(own):
        if name != ALL_ACCOUNTS:
            convert.account_id_of(name, field)
        raise not_found(name)
    return own
