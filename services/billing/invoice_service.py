"""Invoices' methods: parse, one call of the store, build. Who reaches what: see service.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from maas.billing.v1 import invoice_service_pb2 as invoice_pb
from maas.billing.v1 import invoice_service_pb2_grpc
from typing_extensions import override

from libs import paging
from libs.clock import Clock
from services.billing.domain import account_name
from services.billing.invoice_convert import check_customer, invoice_ids_of, invoice_to_pb
from services.billing.invoice_document import render
from services.billing.invoices import month_of
from services.billing.service import reachable_account
from services.billing.store.invoices import InvoiceStore
from services.billing.usage_service import reading_time_s

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]

# Each may be a megabyte.
_PAGE_SIZE_MAX = 24


class InvoiceService(invoice_service_pb2_grpc.InvoiceServiceServicer):
    """What an account used in a month: maas.billing.v1.InvoiceService."""

    def __init__(self, store: InvoiceStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    @override
    async def PreviewInvoice(
        self, request: invoice_pb.PreviewInvoiceRequest, _: Context
    ) -> invoice_pb.PreviewInvoiceResponse:
        """Computes what an invoice would say now."""
        invoice = await self._store.preview(
            check_customer(reachable_account(request.parent, "parent"), "parent"),
            month_of(request.month, "month"),
            timeout_s=reading_time_s(self._clock),
        )
        return invoice_pb.PreviewInvoiceResponse(invoice=invoice_to_pb(invoice))

    @override
    async def IssueInvoice(
        self, request: invoice_pb.IssueInvoiceRequest, _: Context
    ) -> invoice_pb.IssueInvoiceResponse:
        """Issues the invoice of a month that is over."""
        invoice = await self._store.issue(
            check_customer(reachable_account(request.parent, "parent"), "parent"),
            month_of(request.month, "month"),
            self._clock.now(),
            timeout_s=reading_time_s(self._clock),
        )
        return invoice_pb.IssueInvoiceResponse(invoice=invoice_to_pb(invoice))

    @override
    async def VoidInvoice(
        self, request: invoice_pb.VoidInvoiceRequest, _: Context
    ) -> invoice_pb.VoidInvoiceResponse:
        """Makes an invoice void."""
        account_id, number = invoice_ids_of(request.name, "name")
        invoice = await self._store.void(account_id, number, self._clock.now())
        return invoice_pb.VoidInvoiceResponse(invoice=invoice_to_pb(invoice))

    @override
    async def GetInvoice(
        self, request: invoice_pb.GetInvoiceRequest, _: Context
    ) -> invoice_pb.GetInvoiceResponse:
        """Reads an invoice."""
        invoice = await self._store.get_invoice(*_reachable_invoice(request.name))
        return invoice_pb.GetInvoiceResponse(invoice=invoice_to_pb(invoice))

    @override
    async def ListInvoices(
        self, request: invoice_pb.ListInvoicesRequest, _: Context
    ) -> invoice_pb.ListInvoicesResponse:
        """Lists the invoices of an account, oldest first."""
        asked = paging.page_of(request.page_size, request.page_token)
        page = paging.Page(size=min(asked.size, _PAGE_SIZE_MAX), after=asked.after)
        invoices = await self._store.list_invoices(
            check_customer(reachable_account(request.parent, "parent"), "parent"), page
        )
        items, token = paging.cut(
            [invoice_to_pb(invoice) for invoice in invoices],
            page,
            lambda item: str(invoice_ids_of(item.name, "name")[1]),
        )
        return invoice_pb.ListInvoicesResponse(invoices=items, next_page_token=token)

    @override
    async def RenderInvoice(
        self, request: invoice_pb.RenderInvoiceRequest, _: Context
    ) -> invoice_pb.RenderInvoiceResponse:
        """Renders an invoice as a document for people."""
        document = await self._store.get_document(*_reachable_invoice(request.name))
        return invoice_pb.RenderInvoiceResponse(html=render(document))


def _reachable_invoice(name: str) -> tuple[str, int]:
    """Returns account and number of the invoice that the caller names.

    Raises:
        InvalidArgument: the name has another form.
        NotFound: it is not of the tenant's own account.
    """
    account_id, number = invoice_ids_of(name, "name")
    return reachable_account(account_name(account_id), "name"), number
