"""Features of what can be checked by others: U4 (receipts), U6 (the auditor), B-12 (exports)."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from google.protobuf import json_format
from google.protobuf.message import Message
from maas.billing.v1 import audit_service_pb2 as audits
from maas.billing.v1 import ledger_pb2
from maas.common.v1 import receipt_pb2
from maas.inference.v1 import embedding_service_pb2

from libs.clock import SystemClock
from tools.conformance.delivery import PROMPT, SEED
from tools.conformance.money_customer import Customer, customer, exact_spec, prompt_ids
from tools.conformance.trial import Trial
from tools.conformance.verdict import expect, expect_equal

_ROOT = Path(__file__).resolve().parent.parent.parent
_TOOL_S = 60.0
_RECEIPTS = 6
_NANOS = 10**9


async def receipts_verify(trial: Trial) -> None:
    """U4: signed receipts verify offline, any altered byte does not, and they sum to the bill."""
    async with customer(trial) as buyer, buyer.caller() as tenant:
        signed = []
        ids = await prompt_ids(tenant)
        for number in range(_RECEIPTS - 1):
            streamed = await tenant.read(exact_spec(tenant, ids, 10 + number))
            assert streamed.finished is not None
            signed.append((streamed.generation_id, streamed.finished.receipt))
        whole = await tenant.generate(tenant.spec(PROMPT, 30, seed=SEED), request_id="once")
        signed.append((whole.generation_id, whole.receipt))
        able = await tenant.capabilities()
        if able.capabilities.embedding_dimensions:
            inputs = [embedding_service_pb2.EmbedInput(text=PROMPT)]
            made = await tenant.embed(embedding_service_pb2.EmbedRequest(inputs=inputs))
            signed.append((made.generation_id, made.receipt))
        for generation_id, receipt in signed:
            await buyer.books.record(generation_id)
            expect(bool(receipt.signature), "a finished generation has no receipt")
            kept = await buyer.receipt(generation_id=generation_id)
            expect_equal(kept, receipt, "receipt of billing, against that of the last frame")
        by_request = await buyer.receipt(request_id="once")
        expect_equal(by_request, whole.receipt, "receipt by request_id")
        # Ended by the client, so no last frame said it.
        async with tenant.stream(exact_spec(tenant, ids, 3000)) as reading:
            await reading.until(3)
            reading.cancel()
        left = await buyer.books.record(reading.transcript.generation_id)
        receipts = [receipt for _, receipt in signed]
        receipts.append(await buyer.receipt(generation_id=left.generation_id))
        invoice = await buyer.preview(SystemClock().now().strftime("%Y-%m"))
        with tempfile.TemporaryDirectory(prefix="maas-receipts-") as folder:
            files = _Files(Path(folder))
            files.write("keys.json", [await buyer.receipt_keys()])
            files.write("invoice.json", [invoice])
            files.write("receipts.json", receipts)
            await _verify(trial, files, receipts)
        records = await buyer.records()
    charged = sum(record.charge.nanos for record in records)
    expect_equal(invoice.total.nanos, charged, "total of the invoice, against the records")
    trial.show(f"{len(receipts)} receipts sum to the {charged} nanos of the invoice's preview")


@dataclass(frozen=True, slots=True)
class _Files:
    """Documents for a program, in a folder that goes again."""

    folder: Path

    def write(self, name: str, messages: Sequence[Message]) -> None:
        """Writes messages as grpcurl prints them, one after the other."""
        text = "\n".join(json_format.MessageToJson(message) for message in messages)
        (self.folder / name).write_text(text, encoding="utf-8")

    def path(self, name: str) -> str:
        """Path of a file."""
        return str(self.folder / name)


async def _verify(
    trial: Trial, files: _Files, receipts: Sequence[receipt_pb2.SignedReceipt]
) -> None:
    """Has the offline verifier look at the receipts, and at altered ones."""
    keys = ("--keys", files.path("keys.json"))
    program = ("tools.verify", files.path("receipts.json"), *keys)
    code, printed = await _run(*program, "--invoice", files.path("invoice.json"))
    expect_equal(code, 0, f"exit code of the verifier, which says {printed[-200:]!r}")
    first = receipts[0]
    altered = [_flipped(first, at) for at in range(len(first.receipt))]
    for at in range(0, len(first.signature), 7):
        raw = bytearray(first.signature)
        raw[at] ^= 1
        altered.append(_changed(first, signature=bytes(raw)))
    altered.append(_changed(first, key_id="0" * len(first.key_id)))
    altered.append(_changed(first, receipt=receipts[1].receipt))
    files.write("altered.json", altered)
    code, printed = await _run("tools.verify", files.path("altered.json"), *keys)
    expect_equal(code, 1, "exit code of the verifier on altered receipts")
    summary = f"0 good, {len(altered)} bad"
    expect(summary in printed, f"expected {summary!r}, the verifier says {printed[-200:]!r}")
    files.write("fewer.json", receipts[1:])
    fewer = ("tools.verify", files.path("fewer.json"), *keys)
    code, _ = await _run(*fewer, "--invoice", files.path("invoice.json"))
    expect_equal(code, 1, "exit code where a receipt is missing for the invoice")
    trial.show(
        f"{len(receipts)} receipts, in last frames, by id and by request_id, verify offline;"
        f" {len(altered)} altered ones do not; one left out is noticed"
    )


def _flipped(signed: receipt_pb2.SignedReceipt, at: int) -> receipt_pb2.SignedReceipt:
    raw = bytearray(signed.receipt)
    raw[at] ^= 1
    return _changed(signed, receipt=bytes(raw))


def _changed(
    signed: receipt_pb2.SignedReceipt,
    *,
    receipt: bytes | None = None,
    key_id: str | None = None,
    signature: bytes | None = None,
) -> receipt_pb2.SignedReceipt:
    return receipt_pb2.SignedReceipt(
        receipt=signed.receipt if receipt is None else receipt,
        key_id=signed.key_id if key_id is None else key_id,
        signature=signed.signature if signature is None else signature,
    )


async def _run(module: str, *arguments: str) -> tuple[int, str]:
    """Runs a tool as an operator would; its exit code and what it printed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        cwd=_ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_TOOL_S):
            printed, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return process.returncode, printed.decode("utf-8", "replace")


async def exports_can_be_replayed(trial: Trial) -> None:
    """B-12: CloudEvents and FOCUS CSV; a repeat is the same, to the byte and by event id."""
    async with customer(trial) as buyer:
        async with buyer.caller() as tenant:
            ids = await prompt_ids(tenant)
            for number in range(4):
                spec = exact_spec(tenant, ids, 5 + number)
                spec.labels["team"] = f'a,"b"\n{number}'
                generation = await tenant.generate(spec)
                await buyer.books.record(generation.generation_id)
        records = await buyer.records()
        with tempfile.TemporaryDirectory(prefix="maas-export-") as folder:
            events = await _export(trial, buyer, Path(folder), "cloudevents")
            again = await _export(trial, buyer, Path(folder), "cloudevents")
            table = await _export(trial, buyer, Path(folder), "focus")
    expect(events == again, "a repeated export differs")
    imported: dict[tuple[str, str], int] = {}
    for line in (events + again).splitlines():
        event = json.loads(line)
        imported[event["source"], event["id"]] = int(event["data"]["charge_nanos"])
    _require_all(records, {name: nanos for (_, name), nanos in imported.items()})
    rows = list(csv.DictReader(io.StringIO(table)))
    billed = sum(Decimal(row["BilledCost"]) for row in rows)
    charged = Decimal(sum(record.charge.nanos for record in records)) / _NANOS
    expect_equal(billed, charged, "sum of BilledCost")
    trial.show(
        f"{len(records)} CloudEvents, exported and imported twice: {len(imported)} events, each the"
        f" record's charge; FOCUS CSV of {len(rows)} rows sums to {charged} USD"
    )


def _require_all(records: Sequence[ledger_pb2.UsageRecord], imported: dict[str, int]) -> None:
    wanted = {record.generation_id: record.charge.nanos for record in records}
    expect_equal(imported, wanted, "charges by event id")


async def _export(trial: Trial, buyer: Customer, folder: Path, form: str) -> str:
    place = trial.deployment
    assert place.billing is not None
    key = folder / "key"
    key.touch(mode=0o600)
    key.write_text(buyer.key.secret, encoding="ascii")
    flags = ["--endpoint", place.billing, "--format", form, "--key-file", str(key)]
    if place.certificates is not None:
        trusted = folder / "ca.pem"
        trusted.write_bytes(place.certificates)
        flags += ["--ca", str(trusted)]
    code, printed = await _run("tools.export", *flags)
    expect_equal(code, 0, f"exit code of an export as {form}")
    return printed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tampering:
    """Something that a hand may alter in the database.

    Attributes:
        name: for people.
        statement: does it; {account} is the id of an account, {by} is 1.
        invariant: that has to be named.
    """

    name: str
    statement: str
    invariants: frozenset[str]


_TAMPERINGS = (
    _Tampering(
        name="a balance",
        statement="UPDATE billing.balance SET posted = posted + {by}"
        " WHERE account_id = '{account}'",
        invariants=frozenset({"I2"}),
    ),
    _Tampering(
        name="a ledger entry",
        statement="UPDATE billing.ledger_entry SET amount = amount + {by} WHERE number = (SELECT"
        " max(number) FROM billing.ledger_entry WHERE account_id = '{account}')",
        invariants=frozenset({"I1", "I2"}),
    ),
    _Tampering(
        name="a receipt",
        statement="UPDATE billing.receipt SET content = set_byte(content, 9, (get_byte(content, 9)"
        " + 256 + {by}) % 256) WHERE record_number = (SELECT max(number) FROM"
        " billing.usage_record WHERE account_id = '{account}')",
        invariants=frozenset({"I8"}),
    ),
)


async def the_auditor_finds_it(trial: Trial) -> None:
    """U6: Reconcile finds nothing; and what a hand has altered it finds and names."""
    async with customer(trial) as buyer:
        async with buyer.caller() as tenant:
            spec = exact_spec(tenant, await prompt_ids(tenant), 10)
            generation = await tenant.generate(spec)
        record = await buyer.books.record(generation.generation_id)
        await buyer.refund(record.name, 1)
        await buyer.at_rest()
        summary = await _require_clean(buyer, "of an untouched ledger")
        trial.show(
            f"nothing found in {summary.record_count} records and {summary.entry_count} entries"
        )
        if trial.deployment.tamper is None:
            trial.lack("a row altered by hand: only on the kit's own suite")
            return
        for tampering in _TAMPERINGS:
            await _tamper(trial, buyer, tampering)
        await _require_clean(buyer, "after everything was put back")


async def _require_clean(buyer: Customer, what: str) -> audits.AuditSummary:
    found, summary = await buyer.reconcile()
    first = [f"{item.invariant} {item.resource}: {item.description}" for item in found[:3]]
    expect_equal(first, [], f"violations {what}")
    expect_equal(summary.violation_count, 0, f"violations {what}, as the summary says")
    return summary


async def _tamper(trial: Trial, buyer: Customer, tampering: _Tampering) -> None:
    """Alters a row, has it found, and puts it back."""
    alter = trial.deployment.tamper
    assert alter is not None
    account = buyer.account.removeprefix("accounts/")
    await alter(tampering.statement.format(account=account, by=1) + ";")
    try:
        found, _ = await buyer.reconcile()
    finally:
        await alter(tampering.statement.format(account=account, by=-1) + ";")
    mine = [item for item in found if item.resource.startswith((buyer.account, "ledger"))]
    named = {item.invariant for item in found}
    expect(bool(mine), f"{tampering.name} altered by hand was not found")
    expect(
        tampering.invariants <= named,
        f"{tampering.name} altered by hand: expected {sorted(tampering.invariants)},"
        f" got {sorted(named)}",
    )
    names = any(item.resource.startswith(buyer.account) for item in found)
    expect(names, f"{tampering.name} altered by hand: no finding names the account")
    trial.show(f"{tampering.name} altered in SQL: {', '.join(sorted(named))} at {mine[0].resource}")
