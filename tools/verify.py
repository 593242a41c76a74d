"""Verifies receipts offline: python -m tools.verify RECEIPTS --keys KEYS [--invoice INVOICE].

RECEIPTS: JSON, one document after the other, in each of which signed receipts are found wherever
they stand: what grpcurl prints for GetReceipt, a last frame, a SignedReceipt a line; or one
serialized SignedReceipt. KEYS: what grpcurl prints for ListReceiptKeys, or public keys in base64,
one a line. INVOICE: what it prints for GetInvoice.

Opens no connection: needs nothing but these files. Exit code 0: all is well; 1: something is not;
2: a file cannot be read. A signature proves what the operator said, not that a model ran.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message
from maas.billing.v1 import invoice_service_pb2, usage_service_pb2
from maas.common.v1 import receipt_pb2

from libs.receipts import BadReceipt, ReceiptContent, ReceiptKeys, key_id_of, keys_from_text

EXIT_OK = 0
EXIT_BAD = 1
EXIT_UNREADABLE = 2
_DEPTH_MAX = 32
_NANOS = 10**9

MessageT = TypeVar("MessageT", bound=Message)
_SPACE = re.compile(r"\s*")

Json = object
Line = tuple[str, str]
"""Offering and price: what an invoice has a line for."""


class Unreadable(Exception):
    """A file is not what it has to be; the message says which and why."""


@dataclasses.dataclass(slots=True)
class Tally:
    """What receipts, or a line of an invoice, sum to.

    Attributes:
        records: how many.
        input_tokens: of all of them; the rest likewise.
        charge_nanos: nanos.
    """

    records: int = 0
    input_tokens: int = 0
    cached_input_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    charge_nanos: int = 0

    def add(self, content: ReceiptContent) -> None:
        """Adds one receipt."""
        self.records += 1
        self.input_tokens += content.input_tokens
        self.cached_input_tokens += content.cached_input_tokens
        self.output_tokens += content.output_tokens
        self.reasoning_tokens += content.reasoning_tokens
        self.charge_nanos += content.charge_nanos


def main(arguments: Sequence[str] | None = None) -> int:
    """Verifies what the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.verify", description="Verify receipts.")
    parser.add_argument("receipts", type=Path, help="file of receipts")
    parser.add_argument("--keys", type=Path, required=True, help="file of public keys")
    parser.add_argument("--invoice", type=Path, help="invoice that they have to sum to")
    options = parser.parse_args(arguments)
    try:
        keys = read_keys(options.keys)
        signed = read_receipts(options.receipts)
        invoice = None if options.invoice is None else read_invoice(options.invoice)
    except Unreadable as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_UNREADABLE
    contents, bad = verify_all(signed, keys)
    print(f"{len(contents)} good, {bad} bad, {usd(sum(item.charge_nanos for item in contents))}")
    if invoice is not None:
        bad += compare(contents, invoice)
    return EXIT_BAD if bad or not signed else EXIT_OK


def verify_all(
    signed: Sequence[receipt_pb2.SignedReceipt], keys: ReceiptKeys
) -> tuple[list[ReceiptContent], int]:
    """Verifies receipts and prints a line for each; returns the good ones and how many are bad.

    The same receipt twice counts once; two receipts of one generation that differ are bad.
    """
    good: dict[str, ReceiptContent] = {}
    bad = 0
    for number, item in enumerate(signed, start=1):
        try:
            content = keys.verify(
                receipt=item.receipt, key_id=item.key_id, signature=item.signature
            )
        except BadReceipt as error:
            bad += 1
            print(f"BAD   receipt {number}: {error}")
            continue
        earlier = good.get(content.generation_id)
        if earlier is not None:
            bad += earlier != content
            verdict = "again" if earlier == content else "BAD   another receipt of"
            print(f"{verdict} {content.generation_id}")
            continue
        good[content.generation_id] = content
        print(
            f"good  {content.generation_id} {content.account} {content.offering} "
            f"in {content.input_tokens} out {content.output_tokens} {usd(content.charge_nanos)}"
        )
    return list(good.values()), bad


def compare(contents: Sequence[ReceiptContent], invoice: invoice_service_pb2.Invoice) -> int:
    """Compares receipts with an invoice line by line, and prints that; returns what differs.

    A line has to have the charge that its receipts sum to, or less where the account did not have
    that much. It may have more records: what ended by our fault is free, is counted all the same,
    and may have left no receipt.
    """
    differences = _strangers(contents, invoice)
    receipts: dict[Line, Tally] = defaultdict(Tally)
    for content in contents:
        receipts[content.offering, content.price].add(content)
    billed = {(line.offering, line.price): _tally_of(line) for line in invoice.lines}
    for line in sorted(receipts.keys() | billed.keys()):
        differences += _compare_line(line, receipts.get(line, Tally()), billed.get(line, Tally()))
    total = sum(tally.charge_nanos for tally in billed.values()) + invoice.refunds.nanos
    if total != invoice.total.nanos:
        differences += 1
        print(
            f"BAD   lines and refunds of the invoice sum to {usd(total)}, "
            f"its total is {usd(invoice.total.nanos)}"
        )
    print(f"invoice {invoice.name or invoice.month}: {differences} differences")
    return differences


def _strangers(contents: Sequence[ReceiptContent], invoice: invoice_service_pb2.Invoice) -> int:
    """Prints receipts that another account paid for; returns how many."""
    account = invoice.name.partition("/invoices/")[0]
    found = [item for item in contents if account and item.account != account]
    for item in found:
        print(f"BAD   {item.generation_id} is of {item.account}, the invoice of {account}")
    return len(found)


def _compare_line(line: Line, receipts: Tally, billed: Tally) -> int:
    name = " at ".join(line)
    missing = billed.records - receipts.records
    owed = receipts.charge_nanos - billed.charge_nanos
    if owed > 0 and dataclasses.replace(receipts, charge_nanos=billed.charge_nanos) == billed:
        print(f"good  {name}: {usd(billed.charge_nanos)}; the account had {usd(owed)} too little")
        return 0
    if receipts.charge_nanos != billed.charge_nanos or missing < 0:
        print(
            f"BAD   {name}: {receipts.records} receipts sum to {usd(receipts.charge_nanos)}, "
            f"the invoice says {billed.records} and {usd(billed.charge_nanos)}"
        )
        return 1
    if missing:
        print(f"good  {name}: {usd(billed.charge_nanos)}; {missing} free records have no receipt")
        return 0
    if receipts != billed:
        print(f"BAD   {name}: tokens differ: receipts {receipts}, invoice {billed}")
        return 1
    print(f"good  {name}: {usd(billed.charge_nanos)} of {billed.records} receipts")
    return 0


def _tally_of(line: invoice_service_pb2.InvoiceLine) -> Tally:
    return Tally(
        records=line.record_count,
        input_tokens=line.usage.input_tokens,
        cached_input_tokens=line.usage.cached_input_tokens,
        output_tokens=line.usage.output_tokens,
        reasoning_tokens=line.usage.reasoning_tokens,
        charge_nanos=line.charge.nanos,
    )


def read_receipts(path: Path) -> list[receipt_pb2.SignedReceipt]:
    """Reads all signed receipts of a file, in order.

    Raises:
        Unreadable: it is neither JSON nor a serialized SignedReceipt.
    """
    raw = _read(path)
    try:
        documents = list(_documents(raw.decode("utf-8")))
    except ValueError:
        return [_serialized(path, raw)]
    return [item for document in documents for item in _signed_in(document, path, 0)]


def read_keys(path: Path) -> ReceiptKeys:
    """Reads public keys: pages of ListReceiptKeys, or lines of base64.

    Raises:
        Unreadable: it is neither, or a key does not have the id that stands beside it.
    """
    raw = _read(path)
    try:
        text = raw.decode("utf-8")
        if not text.lstrip().startswith("{"):
            return ReceiptKeys(keys_from_text(text))
        keys: list[bytes] = []
        for document in _documents(text):
            page = _message(document, usage_service_pb2.ListReceiptKeysResponse())
            for key in page.keys:
                if key_id_of(key.public_key) != key.key_id:
                    raise Unreadable(f"{path}: {key.key_id} is not the id of its key")
                keys.append(key.public_key)
        return ReceiptKeys(keys)
    except (ValueError, BadReceipt, json_format.ParseError) as error:
        raise Unreadable(f"{path}: holds no keys: {error}") from None


def read_invoice(path: Path) -> invoice_service_pb2.Invoice:
    """Reads an invoice, alone or in the response of a method.

    Raises:
        Unreadable: it is none.
    """
    try:
        (document,) = _documents(_read(path).decode("utf-8"))
        if isinstance(document, dict):
            document = document.get("invoice", document)
        invoice = _message(document, invoice_service_pb2.Invoice())
    except (ValueError, json_format.ParseError) as error:
        raise Unreadable(f"{path}: holds no invoice: {error}") from None
    if not invoice.month:
        raise Unreadable(f"{path}: holds no invoice")
    return invoice


def usd(nanos: int) -> str:
    """Writes an amount exactly."""
    whole, rest = divmod(abs(nanos), _NANOS)
    sign = "-" if nanos < 0 else ""
    return f"{sign}{whole}.{rest:09d} USD"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}") from None


def _documents(text: str) -> Iterator[Json]:
    """Reads JSON documents that follow each other.

    Raises:
        ValueError: it is no JSON.
    """
    decoder = json.JSONDecoder()
    position = _end_of_space(text, 0)
    while position < len(text):
        try:
            document, position = decoder.raw_decode(text, position)
        except RecursionError:
            raise ValueError("is nested too deep") from None
        yield document
        position = _end_of_space(text, position)


def _end_of_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    assert found is not None
    return found.end()


def _signed_in(document: Json, path: Path, depth: int) -> Iterator[receipt_pb2.SignedReceipt]:
    """Finds signed receipts wherever they stand in a document."""
    if depth > _DEPTH_MAX:
        raise Unreadable(f"{path}: is nested too deep")
    if isinstance(document, list):
        for item in document:
            yield from _signed_in(item, path, depth + 1)
    elif isinstance(document, dict):
        if isinstance(document.get("receipt"), str) and "signature" in document:
            yield _from_json(document, path)
            return
        for item in document.values():
            yield from _signed_in(item, path, depth + 1)


def _message(document: Json, empty: MessageT) -> MessageT:
    """Reads a message from JSON as protobuf writes it, leaving out what it does not know.

    Raises:
        ParseError: it is not that message.
    """
    return json_format.Parse(json.dumps(document), empty, ignore_unknown_fields=True)


def _from_json(document: Json, path: Path) -> receipt_pb2.SignedReceipt:
    try:
        return _message(document, receipt_pb2.SignedReceipt())
    except json_format.ParseError as error:
        raise Unreadable(f"{path}: a receipt is not written as it has to be: {error}") from None


def _serialized(path: Path, raw: bytes) -> receipt_pb2.SignedReceipt:
    try:
        return receipt_pb2.SignedReceipt.FromString(raw)
    except DecodeError:
        raise Unreadable(f"{path}: holds no receipts") from None


if __name__ == "__main__":
    sys.exit(main())
