"""A customer of the kit's own: an organization with an account, projects, keys, limits.

Everything is made through public methods by an administrator. What is over is taken back at the
end: keys are revoked, limits deleted, the credit that is left is withdrawn. Organizations stay, for
the ledger never forgets: they are named `conformance-` and have nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from maas.auth.v1 import api_key_service_pb2 as api_keys
from maas.auth.v1 import tenancy_pb2
from maas.auth.v1 import tenancy_service_pb2 as tenancy
from maas.auth.v1.api_key_service_pb2_grpc import ApiKeyServiceStub
from maas.auth.v1.tenancy_service_pb2_grpc import TenancyServiceStub
from maas.billing.v1 import account_service_pb2 as accounts
from maas.billing.v1 import audit_service_pb2 as audits
from maas.billing.v1 import invoice_service_pb2 as invoice_pb
from maas.billing.v1 import ledger_pb2
from maas.billing.v1 import limit_service_pb2 as limits
from maas.billing.v1 import price_service_pb2 as prices
from maas.billing.v1 import usage_service_pb2 as usage_pb
from maas.billing.v1.account_service_pb2_grpc import AccountServiceStub
from maas.billing.v1.audit_service_pb2_grpc import AuditServiceStub
from maas.billing.v1.invoice_service_pb2_grpc import InvoiceServiceStub
from maas.billing.v1.limit_service_pb2_grpc import LimitServiceStub
from maas.billing.v1.price_service_pb2_grpc import PriceServiceStub
from maas.billing.v1.usage_service_pb2_grpc import UsageServiceStub
from maas.common.v1 import money_pb2, receipt_pb2
from maas.inference.v1 import generation_pb2

from libs.clock import SystemClock
from libs.errors import Code
from libs.units import CURRENCY, Rates
from tools.conformance import operator
from tools.conformance.client import Refusal, Tenant
from tools.conformance.delivery import PROMPT, SEED
from tools.conformance.trial import KEY_KNOWN_S, Trial
from tools.conformance.verdict import CannotShow, expect, expect_equal

CREDIT = 50_000_000_000
HEARD_S = 10.0
"""How long a gateway may take to hear of a limit."""
WINDOW_S = 90.0
"""What is shown of a spend limit takes less: its window shall not end meanwhile."""
PAGE_SIZE = 1000
AUDIT_S = 120.0
NEEDS = "needs --billing, --admin-endpoint and --admin-key-file"

Spec = generation_pb2.GenerationSpec


def usd(nanos: int) -> money_pb2.Money:
    """An amount."""
    return money_pb2.Money(currency_code=CURRENCY, nanos=nanos)


class Customer:
    """An organization that pays.

    Attributes:
        trial: whose connections it uses.
        account: "accounts/{account}".
        project: its first project.
        key: a key of that.
        books: its money, as it sees it itself.
    """

    def __init__(self, trial: Trial, billing: grpc.aio.Channel, auth: grpc.aio.Channel) -> None:
        place = trial.deployment
        assert place.admin_key is not None
        self.trial = trial
        self._id = f"conformance-{secrets.token_hex(6)}"
        self.account = f"accounts/{self._id}"
        self.project = f"projects/{self._id}"
        self.key = operator.NewKey("", "")
        self._billing = billing
        self._money = Tenant(billing, place.admin_key, place.model)
        self._access = Tenant(auth, place.admin_key, place.model)
        self._admin_metadata = (("authorization", f"Bearer {place.admin_key}"),)
        self._keys = ApiKeyServiceStub(auth)
        self._tenants = TenancyServiceStub(auth)
        self._accounts = AccountServiceStub(billing)
        self._limits = LimitServiceStub(billing)
        self._usage = UsageServiceStub(billing)
        self._prices = PriceServiceStub(billing)
        self._invoices = InvoiceServiceStub(billing)
        self._audits = AuditServiceStub(billing)
        self.books = operator.Books(billing, self._money)
        self._stack = AsyncExitStack()

    async def open(self, nanos: int) -> None:
        """Creates organization, project, account and key, and gives the credit."""
        organization = tenancy.CreateOrganizationRequest(
            organization_id=self._id, display_name="Conformance kit"
        )
        await self._access.call(self._tenants.CreateOrganization, organization)
        account = accounts.CreateAccountRequest(account_id=self._id, display_name="Conformance kit")
        await self._money.call(self._accounts.CreateAccount, account)
        await self._create_project(self._id)
        if nanos:
            await self.post(nanos)
        self.key = await self.new_key()
        self.books = operator.Books(self._billing, self.own)

    async def close(self) -> None:
        """Revokes, deletes and withdraws; what fails is left."""
        with contextlib.suppress(Refusal):
            await self._stack.aclose()
        with contextlib.suppress(Refusal):
            left = (await self.balance()).posted.nanos
            if left > 0:
                await self.post(-left)

    @property
    def own(self) -> Tenant:
        """The customer itself, at billing."""
        return self.tenant_at_billing(self.key)

    def tenant_at_billing(self, key: operator.NewKey) -> Tenant:
        """Somebody with a key, at billing."""
        return Tenant(self._billing, key.secret, self.trial.deployment.model)

    @property
    def endpoints(self) -> Sequence[str]:
        """All gateways."""
        place = self.trial.deployment
        return [place.endpoint, *place.more_endpoints]

    @asynccontextmanager
    async def caller(
        self, key: operator.NewKey | None = None, endpoint: str | None = None
    ) -> AsyncIterator[Tenant]:
        """Connects to a gateway with a key."""
        async with self.trial.tenant((key or self.key).secret, endpoint=endpoint) as tenant:
            yield tenant

    @asynccontextmanager
    async def callers(self) -> AsyncIterator[list[Tenant]]:
        """Connects to every gateway."""
        async with AsyncExitStack() as stack:
            yield [
                await stack.enter_async_context(self.caller(endpoint=endpoint))
                for endpoint in self.endpoints
            ]

    async def new_project(self) -> str:
        """One more project; its name."""
        return await self._create_project(f"conformance-{secrets.token_hex(6)}")

    async def _create_project(self, project_id: str) -> str:
        project = tenancy.CreateProjectRequest(
            project_id=project_id, organization=f"organizations/{self._id}"
        )
        await self._access.call(self._tenants.CreateProject, project)
        return f"projects/{project_id}"

    async def new_key(self, project: str | None = None) -> operator.NewKey:
        """One more key that gateways and billing know when this returns.

        Raises:
            CannotShow: they do not know it in time.
        """
        request = api_keys.CreateApiKeyRequest(
            project=project or self.project,
            display_name="conformance",
            role=tenancy_pb2.ROLE_TENANT,
        )
        made = await self._access.call(self._keys.CreateApiKey, request)
        key = operator.NewKey(made.api_key.name, made.secret)
        self._stack.push_async_callback(self.revoke, key)
        for endpoint in self.endpoints:
            async with self.caller(key, endpoint) as tenant:
                if not await operator.within(KEY_KNOWN_S, lambda: operator.is_known(tenant)):
                    raise CannotShow(f"a new key was not known after {KEY_KNOWN_S:g} s")
        if not await operator.within(KEY_KNOWN_S, lambda: self._is_known(key)):
            raise CannotShow(f"a new key was not known to billing after {KEY_KNOWN_S:g} s")
        return key

    async def _is_known(self, key: operator.NewKey) -> bool:
        request = accounts.GetBalanceRequest()
        try:
            await self.tenant_at_billing(key).call(self._accounts.GetBalance, request)
        except Refusal as refusal:
            return refusal.code is not Code.UNAUTHENTICATED
        return True

    async def revoke(self, key: operator.NewKey) -> None:
        """Revokes a key."""
        await self._access.call(
            self._keys.RevokeApiKey, api_keys.RevokeApiKeyRequest(name=key.name)
        )

    # ---- money

    async def balance(self) -> ledger_pb2.Balance:
        """Money of the account now."""
        request = accounts.GetBalanceRequest(account=self.account)
        return (await self._money.call(self._accounts.GetBalance, request)).balance

    async def at_rest(self) -> ledger_pb2.Balance:
        """Money of the account once nothing is held.

        Raises:
            Mismatch: something stays held.
        """

        async def is_at_rest() -> bool:
            return (await self.balance()).held.nanos == 0

        is_free = await operator.within(operator.REST_S, is_at_rest)
        found = await self.balance()
        held = found.held.nanos
        expect(is_free, f"{held} nanos are still held after {operator.REST_S:g} s")
        return found

    async def post(self, nanos: int) -> ledger_pb2.LedgerEntry:
        """Adjusts the balance."""
        request = accounts.PostEntryRequest(
            account=self.account,
            amount=usd(nanos),
            kind=ledger_pb2.ENTRY_KIND_ADJUSTMENT,
            request_id=secrets.token_hex(8),
            description="conformance kit",
        )
        return (await self._money.call(self._accounts.PostEntry, request)).entry

    async def grant(
        self,
        nanos: int,
        *,
        priority: int,
        expires_in_s: float | None = None,
        kind: ledger_pb2.GrantKind.ValueType = ledger_pb2.GRANT_KIND_GIFT,
    ) -> str:
        """Gives credit; the name of the grant."""
        wanted = ledger_pb2.Grant(amount=usd(nanos), priority=priority, kind=kind)
        if expires_in_s is not None:
            when = SystemClock().now() + timedelta(seconds=expires_in_s)
            wanted.expire_time.FromDatetime(when)
        request = accounts.CreateGrantRequest(
            parent=self.account, grant_id=secrets.token_hex(6), grant=wanted
        )
        return (await self._money.call(self._accounts.CreateGrant, request)).grant.name

    async def grants(self) -> dict[str, ledger_pb2.Grant]:
        """All grants by name, in the order in which they are used up."""
        request = accounts.ListGrantsRequest(
            parent=self.account, show_all=True, page_size=PAGE_SIZE
        )
        found = await self._money.call(self._accounts.ListGrants, request)
        return {item.name: item for item in found.grants}

    async def refund(self, record: str, nanos: int | None = None) -> ledger_pb2.LedgerEntry:
        """Gives a charge back."""
        request = accounts.RefundUsageRequest(
            usage_record=record,
            amount=None if nanos is None else usd(nanos),
            request_id=secrets.token_hex(8),
        )
        return (await self._money.call(self._accounts.RefundUsage, request)).entry

    async def entries(self) -> list[ledger_pb2.LedgerEntry]:
        """All entries of the account, oldest first."""
        found: list[ledger_pb2.LedgerEntry] = []
        token = ""
        while True:
            request = accounts.ListLedgerEntriesRequest(
                parent=self.account, page_size=PAGE_SIZE, page_token=token
            )
            page = await self.own.call(self._accounts.ListLedgerEntries, request)
            found += page.entries
            token = page.next_page_token
            if not token:
                return found

    async def require_sum(self) -> int:
        """States that the balance is the sum of the entries; nanos."""
        posted = (await self.at_rest()).posted.nanos
        total = sum(entry.amount.nanos for entry in await self.entries())
        expect_equal(posted, total, "posted, against the sum of the ledger entries")
        return posted

    async def rates(self, price: str) -> Rates:
        """How a price makes a charge of counts."""
        found = (
            await self.own.call(self._prices.GetPrice, prices.GetPriceRequest(name=price))
        ).price
        return operator.rates_of(found)

    async def require_priced(self, record: ledger_pb2.UsageRecord) -> None:
        """States that a charge is what the counts cost at the price that the record names."""
        usage = record.usage
        charge = (await self.rates(record.price)).charge(
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cached_input_tokens=usage.cached_input_tokens,
            reasoning_tokens=usage.reasoning_tokens,
            is_background=record.background,
        )
        expect_equal(record.charge.nanos, charge, "charge against counts and price")

    # ---- usage

    async def records(
        self, wanted: usage_pb.UsageFilter | None = None
    ) -> list[ledger_pb2.UsageRecord]:
        """Usage records, oldest first."""
        request = usage_pb.ListUsageRecordsRequest(page_size=PAGE_SIZE, filter=wanted)
        return list((await self.own.call(self._usage.ListUsageRecords, request)).usage_records)

    async def summaries(
        self,
        wanted: usage_pb.UsageFilter | None = None,
        group_by: Sequence[usage_pb.UsageDimension.ValueType] = (),
        label_key: str = "",
    ) -> list[usage_pb.UsageSummary]:
        """Sums of usage records."""
        request = usage_pb.SummarizeUsageRequest(
            page_size=PAGE_SIZE, filter=wanted, group_by=group_by, label_key=label_key
        )
        return list((await self.own.call(self._usage.SummarizeUsage, request)).summaries)

    async def receipt(
        self, *, generation_id: str = "", request_id: str = ""
    ) -> receipt_pb2.SignedReceipt:
        """A receipt by either id."""
        request = usage_pb.GetReceiptRequest(generation_id=generation_id, request_id=request_id)
        return (await self.own.call(self._usage.GetReceipt, request)).receipt

    async def receipt_keys(self) -> usage_pb.ListReceiptKeysResponse:
        """The keys that receipts are verified with."""
        request = usage_pb.ListReceiptKeysRequest(page_size=PAGE_SIZE)
        return await self.own.call(self._usage.ListReceiptKeys, request)

    async def preview(self, month: str) -> invoice_pb.Invoice:
        """What an invoice would say now."""
        request = invoice_pb.PreviewInvoiceRequest(month=month)
        return (await self.own.call(self._invoices.PreviewInvoice, request)).invoice

    # ---- limits

    async def limit(self, scope: str, kind: limits.SpendLimit | limits.RateLimit) -> str:
        """Sets a limit that all gateways have heard of when this returns; its name.

        In the last moments of a day, of which one is the last of the month, it waits for the next.
        """
        if isinstance(kind, limits.SpendLimit):
            await operator.past_midnight(SystemClock(), WINDOW_S)
        name = await self._create_limit(scope, kind)
        await self.heard()
        return name

    async def _create_limit(self, scope: str, kind: limits.SpendLimit | limits.RateLimit) -> str:
        limit = limits.Limit(account=self.account, scope=scope)
        if isinstance(kind, limits.SpendLimit):
            limit.spend.CopyFrom(kind)
        else:
            limit.rate.CopyFrom(kind)
        request = limits.CreateLimitRequest(
            limit_id=f"conformance-{secrets.token_hex(6)}", limit=limit
        )
        name = (await self._money.call(self._limits.CreateLimit, request)).limit.name
        self._stack.push_async_callback(self._delete_limit, name)
        return name

    async def _delete_limit(self, name: str) -> None:
        request = limits.DeleteLimitRequest(name=name)
        await self._money.call(self._limits.DeleteLimit, request)

    async def heard(self) -> None:
        """Waits until all gateways know the limits that there are.

        Changes reach a gateway in order: one more limit is set, on a key that is only for this,
        and allows it nothing. Who refuses that key knows all limits before.

        Raises:
            CannotShow: a gateway does not hear of it.
        """
        key = await self.new_key(await self.new_project())
        await self._create_limit(key.name, limits.RateLimit(output_tokens_per_minute=1))
        for endpoint in self.endpoints:
            async with self.caller(key, endpoint) as tenant:
                if not await operator.within(HEARD_S, lambda: _is_refused(tenant)):
                    raise CannotShow(f"a gateway had not heard of a limit after {HEARD_S:g} s")

    async def limit_usage(self, name: str) -> limits.LimitUsage:
        """What is used of a limit now."""
        request = limits.GetLimitRequest(name=name)
        return (await self.own.call(self._limits.GetLimit, request)).usage

    async def alerts(self, limit: str) -> list[limits.SpendAlert]:
        """Alerts of a limit, oldest first."""
        request = limits.ListSpendAlertsRequest(parent=self.account, page_size=PAGE_SIZE)
        found = await self.own.call(self._limits.ListSpendAlerts, request)
        return [alert for alert in found.spend_alerts if alert.limit == limit]

    # ---- audit

    async def reconcile(self) -> tuple[list[audits.Violation], audits.AuditSummary]:
        """Has the auditor look at the account and at the sums of all.

        Raises:
            Refusal: it was refused.
            Mismatch: there was no summary.
        """
        request = audits.ReconcileRequest(account=self.account)
        call = self._audits.Reconcile(request, metadata=self._admin_metadata, timeout=AUDIT_S)
        found: list[audits.Violation] = []
        summaries: list[audits.AuditSummary] = []
        try:
            async for response in call:
                if response.HasField("summary"):
                    summaries.append(response.summary)
                else:
                    found.append(response.violation)
        except grpc.aio.AioRpcError as failure:
            raise Refusal.of(failure) from failure
        finally:
            call.cancel()
        expect_equal(len(summaries), 1, "summaries of an audit")
        return found, summaries[0]


async def _is_refused(tenant: Tenant) -> bool:
    spec = tenant.spec("x", 2, seed=SEED)
    try:
        await tenant.generate(spec)
    except Refusal as refusal:
        return refusal.code is Code.INVALID_ARGUMENT
    return False


@asynccontextmanager
async def customer(trial: Trial, nanos: int = CREDIT) -> AsyncIterator[Customer]:
    """A customer with that much credit; its keys, limits and money go again.

    Raises:
        CannotShow: an address or the administrator's key is missing.
    """
    place = trial.deployment
    if place.billing is None or place.auth is None or place.admin_key is None:
        raise CannotShow(NEEDS)
    found = Customer(trial, await trial.connect(place.billing), await trial.connect(place.auth))
    try:
        await found.open(nanos)
        yield found
    finally:
        await found.close()


@asynccontextmanager
async def as_customer(trial: Trial) -> AsyncIterator[Trial]:
    """The same trial with the key of a customer of its own; shows into the same findings."""
    async with customer(trial) as found:
        place = dataclasses.replace(trial.deployment, api_key=found.key.secret)
        async with Trial(place) as inner:
            inner.findings = trial.findings
            yield inner


async def prompt_ids(tenant: Tenant) -> list[int]:
    """Tokens of a prompt: their number, and so what is held, is known exactly."""
    return await tenant.tokenize(PROMPT, as_prompt=True)


def exact_spec(tenant: Tenant, ids: Sequence[int], output_tokens: int, seed: int = SEED) -> Spec:
    """A request of which hold and charge are equal: known prompt, no cache, runs to its length."""
    spec = tenant.spec("", output_tokens, seed=seed)
    spec.tokens.ids.extend(ids)
    spec.cache.bypass = True
    return spec


def now_to_pb() -> Timestamp:
    """The time."""
    found = Timestamp()
    found.FromDatetime(SystemClock().now())
    return found
