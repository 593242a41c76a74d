"""The offline verifier: files in, verdicts and an exit code out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from google.protobuf import json_format
from maas.billing.v1 import invoice_service_pb2, usage_service_pb2
from maas.common.v1 import money_pb2, receipt_pb2, usage_pb2

from libs.receipts import ReceiptContent, ReceiptSigner, key_to_text
from tools import verify

SIGNER = ReceiptSigner(bytes(range(32)))
STRANGER = ReceiptSigner(bytes(32))
CONTENT = ReceiptContent(
    generation_id="gen_0",
    request_id="",
    account="accounts/acme",
    project="projects/demo",
    offering="offerings/tiny",
    model_version="models/tiny/versions/1",
    price="prices/nano",
    input_tokens=10,
    cached_input_tokens=4,
    output_tokens=7,
    reasoning_tokens=2,
    charge_nanos=17,
    end_cause=1,
    start_time=datetime(2026, 3, 1, tzinfo=UTC),
    end_time=datetime(2026, 3, 2, tzinfo=UTC),
)
CONTENTS = [
    CONTENT,
    CONTENT._replace(generation_id="gen_1", charge_nanos=1_500_000_000),
    CONTENT._replace(generation_id="gen_2", offering="offerings/big"),
]


def receipts(
    folder: Path,
    contents: Sequence[ReceiptContent] = tuple(CONTENTS),
    signer: ReceiptSigner = SIGNER,
) -> Path:
    """A file as a client keeps it: the receipt of each last frame, one a line."""
    path = folder / "receipts.jsonl"
    lines = [json_format.MessageToJson(signer.sign(item), indent=None) for item in contents]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """What grpcurl prints for ListReceiptKeys, two pages."""
    pages = [
        usage_service_pb2.ListReceiptKeysResponse(
            keys=[receipt_pb2.ReceiptKey(key_id=signer.key_id, public_key=signer.public_key)],
            next_page_token="next",
        )
        for signer in (ReceiptSigner(bytes([1] * 32)), SIGNER)
    ]
    path = tmp_path / "keys.json"
    path.write_text("\n".join(json_format.MessageToJson(page) for page in pages))
    return path


def line_of(*contents: ReceiptContent) -> invoice_service_pb2.InvoiceLine:
    return invoice_service_pb2.InvoiceLine(
        offering=contents[0].offering,
        price=contents[0].price,
        record_count=len(contents),
        usage=usage_pb2.TokenUsage(
            input_tokens=sum(item.input_tokens for item in contents),
            cached_input_tokens=sum(item.cached_input_tokens for item in contents),
            output_tokens=sum(item.output_tokens for item in contents),
            reasoning_tokens=sum(item.reasoning_tokens for item in contents),
        ),
        charge=money_pb2.Money(
            currency_code="USD", nanos=sum(item.charge_nanos for item in contents)
        ),
    )


def invoice() -> invoice_service_pb2.Invoice:
    """The invoice of CONTENTS, of which 5 nanos were refunded."""
    return invoice_service_pb2.Invoice(
        name="accounts/acme/invoices/INV-000001",
        month="2026-03",
        lines=[line_of(CONTENTS[2]), line_of(*CONTENTS[:2])],
        refunds=money_pb2.Money(currency_code="USD", nanos=-5),
        total=money_pb2.Money(
            currency_code="USD", nanos=sum(item.charge_nanos for item in CONTENTS) - 5
        ),
        record_count=3,
    )


def write(folder: Path, message: invoice_service_pb2.Invoice) -> Path:
    path = folder / "invoice.json"
    response = invoice_service_pb2.GetInvoiceResponse(invoice=message)
    path.write_text(json_format.MessageToJson(response))
    return path


def run(*arguments: Path | str) -> int:
    return verify.main([str(argument) for argument in arguments])


def test_good_receipts_are_told_one_by_one(
    tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(receipts(tmp_path), "--keys", keys) == verify.EXIT_OK

    assert capsys.readouterr().out.splitlines() == [
        "good  gen_0 accounts/acme offerings/tiny in 10 out 7 0.000000017 USD",
        "good  gen_1 accounts/acme offerings/tiny in 10 out 7 1.500000000 USD",
        "good  gen_2 accounts/acme offerings/big in 10 out 7 0.000000017 USD",
        "3 good, 0 bad, 1.500000034 USD",
    ]


def test_keys_may_be_lines_of_base64(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{key_to_text(SIGNER.public_key)}\n")

    assert run(receipts(tmp_path), "--keys", path) == verify.EXIT_OK


def test_any_flipped_byte_fails(tmp_path: Path, keys: Path) -> None:
    whole = SIGNER.sign(CONTENT)
    path = tmp_path / "receipt.json"
    for field in ("receipt", "signature"):
        content = getattr(whole, field)
        for index in range(0, len(content), 7):
            broken = receipt_pb2.SignedReceipt()
            broken.CopyFrom(whole)
            flipped = bytes([content[index] ^ 0x80])
            setattr(broken, field, content[:index] + flipped + content[index + 1 :])
            path.write_text(json_format.MessageToJson(broken))

            assert run(path, "--keys", keys) == verify.EXIT_BAD


def test_receipts_of_another_key_are_bad(
    tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(receipts(tmp_path, signer=STRANGER), "--keys", keys) == verify.EXIT_BAD

    assert "BAD   receipt 3: no such key" in capsys.readouterr().out


def test_receipts_are_found_wherever_they_stand(tmp_path: Path, keys: Path) -> None:
    receipt = json_format.MessageToDict(SIGNER.sign(CONTENT))
    frames = [
        {"receipt": receipt},
        {"frame": {"delta": {"outputs": [{"text": "Once"}]}}},
        {"frame": {"finished": {"usage": {"outputTokens": "7"}, "receipt": receipt}}},
    ]
    path = tmp_path / "frames"
    path.write_text("\n\n".join(json.dumps(frame, indent=2) for frame in frames))

    found = verify.read_receipts(path)

    assert found == [SIGNER.sign(CONTENT)] * 2
    # The same one twice is one.
    assert verify.verify_all(found, verify.read_keys(keys)) == ([CONTENT], 0)


def test_a_serialized_receipt_is_read(tmp_path: Path, keys: Path) -> None:
    path = tmp_path / "receipt.bin"
    path.write_bytes(SIGNER.sign(CONTENT).SerializeToString())

    assert run(path, "--keys", keys) == verify.EXIT_OK


def test_two_receipts_of_one_generation_that_differ_are_bad(tmp_path: Path, keys: Path) -> None:
    other = CONTENT._replace(charge_nanos=18)

    assert run(receipts(tmp_path, [CONTENT, other]), "--keys", keys) == verify.EXIT_BAD
    assert run(receipts(tmp_path, [CONTENT, CONTENT]), "--keys", keys) == verify.EXIT_OK


def test_no_receipts_at_all_are_nothing_good(tmp_path: Path, keys: Path) -> None:
    assert run(receipts(tmp_path, []), "--keys", keys) == verify.EXIT_BAD


def test_receipts_of_a_month_sum_to_the_invoice(
    tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, invoice())

    assert run(receipts(tmp_path), "--keys", keys, "--invoice", path) == verify.EXIT_OK

    assert capsys.readouterr().out.splitlines()[-3:] == [
        "good  offerings/big at prices/nano: 0.000000017 USD of 1 receipts",
        "good  offerings/tiny at prices/nano: 1.500000017 USD of 2 receipts",
        "invoice accounts/acme/invoices/INV-000001: 0 differences",
    ]


def test_free_records_need_no_receipt(tmp_path: Path, keys: Path) -> None:
    bill = invoice()
    bill.lines[1].record_count += 1
    bill.lines[1].usage.output_tokens += 3

    path = write(tmp_path, bill)

    assert run(receipts(tmp_path), "--keys", keys, "--invoice", path) == verify.EXIT_OK


def test_a_charge_that_the_account_could_not_pay_whole_is_no_difference(
    tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A receipt says what was due; the invoice what was taken, and never more."""
    bill = invoice()
    bill.lines[1].charge.nanos -= 6
    bill.total.nanos -= 6

    path = write(tmp_path, bill)

    assert run(receipts(tmp_path), "--keys", keys, "--invoice", path) == verify.EXIT_OK
    line = "offerings/tiny at prices/nano: 1.500000011 USD; the account had 0.000000006 USD too"
    assert line in capsys.readouterr().out


def overcharge(bill: invoice_service_pb2.Invoice) -> None:
    bill.lines[0].charge.nanos += 1
    bill.total.nanos += 1


def miscount(bill: invoice_service_pb2.Invoice) -> None:
    bill.lines[0].usage.output_tokens += 1


def invent_a_line(bill: invoice_service_pb2.Invoice) -> None:
    bill.lines.add(
        offering="offerings/new", price="prices/nano", record_count=1, charge=bill.lines[0].charge
    )
    bill.total.nanos += bill.lines[0].charge.nanos


def drop_a_line(bill: invoice_service_pb2.Invoice) -> None:
    bill.total.nanos -= bill.lines[0].charge.nanos
    del bill.lines[0]


def lose_a_record(bill: invoice_service_pb2.Invoice) -> None:
    bill.lines[1].record_count -= 1


def miss_the_total(bill: invoice_service_pb2.Invoice) -> None:
    bill.total.nanos += 1


def name_another(bill: invoice_service_pb2.Invoice) -> None:
    bill.name = "accounts/other/invoices/INV-000001"


@pytest.mark.parametrize(
    "spoil",
    [
        overcharge,
        miscount,
        invent_a_line,
        drop_a_line,
        lose_a_record,
        miss_the_total,
        name_another,
    ],
)
def test_an_invoice_that_differs_is_bad(
    tmp_path: Path, keys: Path, spoil: object, capsys: pytest.CaptureFixture[str]
) -> None:
    bill = invoice()
    assert callable(spoil)
    spoil(bill)

    path = write(tmp_path, bill)

    assert run(receipts(tmp_path), "--keys", keys, "--invoice", path) == verify.EXIT_BAD
    assert "BAD" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[" * 10_000,
        '{"receipt": "AA==", "signature": 7}',
        '{"keys": [{"keyId": 1}]}',
    ],
)
def test_files_that_are_something_else_are_named(
    tmp_path: Path, keys: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad"
    bad.write_text(text)
    good = receipts(tmp_path)

    codes = [
        run(bad, "--keys", keys),
        run(good, "--keys", bad),
        run(good, "--keys", keys, "--invoice", bad),
    ]

    assert verify.EXIT_OK not in codes
    assert str(bad) in capsys.readouterr().err
    assert run(tmp_path / "absent", "--keys", keys) == verify.EXIT_UNREADABLE


def test_a_key_with_the_wrong_id_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    page = usage_service_pb2.ListReceiptKeysResponse(
        keys=[receipt_pb2.ReceiptKey(key_id=STRANGER.key_id, public_key=SIGNER.public_key)]
    )
    path.write_text(json_format.MessageToJson(page))

    assert run(receipts(tmp_path), "--keys", path) == verify.EXIT_UNREADABLE
