"""Messages to values and back. Pure; what is wrong in a message is refused with its path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from maas.billing.v1 import account_service_pb2, credit_slice_service_pb2, ledger_pb2
from maas.common.v1 import money_pb2, receipt_pb2, usage_pb2

from libs.errors import FieldRule, InvalidArgument, Reason, Violation, invalid_field
from libs.ids import parse_name
from libs.units import CURRENCY, NANOS_MAX
from services.billing.domain import (
    ENGINE_TIME_MAX_US,
    NO_LABELS,
    SYSTEM_PREFIX,
    TOKENS_MAX,
    Account,
    Balance,
    EndCause,
    Entry,
    EntryKind,
    Posting,
    Receipt,
    Settlement,
    UsageRecord,
    account_name,
)

_VIOLATIONS_MAX = 16
_SHA256_BYTES = 32
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_KIND_TO_PB = {
    EntryKind.GRANT: ledger_pb2.ENTRY_KIND_GRANT,
    EntryKind.ADJUSTMENT: ledger_pb2.ENTRY_KIND_ADJUSTMENT,
    EntryKind.USAGE: ledger_pb2.ENTRY_KIND_USAGE,
    EntryKind.TOP_UP: ledger_pb2.ENTRY_KIND_TOP_UP,
    EntryKind.REFUND: ledger_pb2.ENTRY_KIND_REFUND,
    EntryKind.EXPIRY: ledger_pb2.ENTRY_KIND_EXPIRY,
}
_POSTED_KINDS = {
    ledger_pb2.ENTRY_KIND_GRANT: EntryKind.GRANT,
    ledger_pb2.ENTRY_KIND_ADJUSTMENT: EntryKind.ADJUSTMENT,
}
_END_CAUSES = {cause.value: cause for cause in EndCause}


@lru_cache(maxsize=4096)
def ids_of(name: str, pattern: str, field: str) -> tuple[str, ...]:
    """Does what parse_name does; names of a batch repeat a lot."""
    return parse_name(name, pattern, field=field)


def account_id_of(name: str, field: str) -> str:
    """Reads the name of an account.

    Raises:
        InvalidArgument: it is none.
    """
    return ids_of(name, "accounts/*", field)[0]


def offering_id_of(name: str, field: str) -> str:
    """Reads the name of an offering.

    Raises:
        InvalidArgument: it is none.
    """
    return ids_of(name, "offerings/*", field)[0]


def project_id_of(name: str, field: str) -> str:
    """Reads the name of a project.

    Raises:
        InvalidArgument: it is none.
    """
    return ids_of(name, "projects/*", field)[0]


def price_id_of(name: str, field: str) -> str:
    """Reads the name of a price.

    Raises:
        InvalidArgument: it is none.
    """
    return ids_of(name, "prices/*", field)[0]


def text_of(text: str, field: str) -> str:
    """Takes a free text.

    Raises:
        InvalidArgument: it has a NUL, which PostgreSQL stores in no text.
    """
    if "\0" in text:
        raise invalid_field(field, FieldRule.BAD_FORMAT, "must not contain NUL")
    return text


def texts_of(texts: Iterable[str], field: str) -> list[str]:
    """Takes free texts.

    Raises:
        InvalidArgument: one has a NUL or is empty.
    """
    found = [text_of(text, f"{field}[{index}]") for index, text in enumerate(texts)]
    if "" in found:
        raise invalid_field(f"{field}[{found.index('')}]", FieldRule.REQUIRED, "must not be empty")
    return found


def money_to_pb(nanos: int) -> money_pb2.Money:
    """Writes an amount."""
    return money_pb2.Money(currency_code=CURRENCY, nanos=nanos)


def nanos_from_pb(money: money_pb2.Money) -> int:
    """Reads an amount.

    Raises:
        InvalidArgument: CURRENCY_MISMATCH, it is not in the ledger's currency.
    """
    if money.currency_code != CURRENCY:
        raise InvalidArgument(
            f"amounts are in {CURRENCY}",
            reason=Reason.CURRENCY_MISMATCH,
            metadata={"left": CURRENCY, "right": money.currency_code},
        )
    return money.nanos


def time_to_pb(time: datetime) -> Timestamp:
    """Writes a time."""
    message = Timestamp()
    message.FromDatetime(time)
    return message


def time_from_pb(message: Timestamp, field: str) -> datetime:
    """Reads a time, UTC, to the microsecond.

    Raises:
        InvalidArgument: it is out of range.
    """
    try:
        # A quarter of the time that Timestamp.ToDatetime takes, twice for each settlement.
        return _EPOCH + timedelta(0, message.seconds, message.nanos // 1000)
    except OverflowError:
        raise invalid_field(field, FieldRule.OUT_OF_RANGE, "is no time") from None


def account_from_pb(request: account_service_pb2.CreateAccountRequest, now: datetime) -> Account:
    """Reads a new account.

    Raises:
        InvalidArgument: the id is kept for the ledger, or the name is no text.
    """
    if request.account_id.startswith(SYSTEM_PREFIX):
        raise invalid_field(
            "account_id", FieldRule.BAD_FORMAT, f"must not start with {SYSTEM_PREFIX}"
        )
    return Account(
        account_id=request.account_id,
        display_name=text_of(request.display_name, "display_name"),
        create_time=now,
    )


def account_to_pb(account: Account) -> ledger_pb2.Account:
    """Writes an account."""
    return ledger_pb2.Account(
        name=account.name,
        display_name=account.display_name,
        currency_code=CURRENCY,
        create_time=time_to_pb(account.create_time),
        credit_limit=money_to_pb(account.credit_limit),
    )


def balance_to_pb(balance: Balance) -> ledger_pb2.Balance:
    """Writes a balance."""
    return ledger_pb2.Balance(
        posted=money_to_pb(balance.posted),
        held=money_to_pb(balance.held),
        available=money_to_pb(balance.available),
        credit_limit=money_to_pb(balance.credit_limit),
    )


def posting_from_pb(request: account_service_pb2.PostEntryRequest) -> Posting:
    """Reads what an operator wants to post.

    Raises:
        InvalidArgument: the account is the ledger's own, the kind or the amount is not allowed.
    """
    account_id = account_id_of(request.account, "account")
    if account_id.startswith(SYSTEM_PREFIX):
        raise invalid_field("account", FieldRule.BAD_FORMAT, "must be a customer's account")
    kind = _POSTED_KINDS.get(request.kind)
    if kind is None:
        raise invalid_field("kind", FieldRule.OUT_OF_RANGE, "must be GRANT or ADJUSTMENT")
    amount = nanos_from_pb(request.amount)
    lowest = 1 if kind is EntryKind.GRANT else -NANOS_MAX
    if amount == 0 or amount < lowest:
        why = "must be positive" if kind is EntryKind.GRANT else "must not be zero or -2^63"
        raise invalid_field("amount.nanos", FieldRule.OUT_OF_RANGE, why)
    return Posting(
        account_id=account_id,
        amount=amount,
        kind=kind,
        request_id=text_of(request.request_id, "request_id"),
        description=text_of(request.description, "description"),
    )


def entry_to_pb(entry: Entry) -> ledger_pb2.LedgerEntry:
    """Writes an entry."""
    account = account_name(entry.account_id)
    return ledger_pb2.LedgerEntry(
        name=f"{account}/ledgerEntries/{entry.number}",
        account=account,
        transaction_id=str(entry.transaction_number),
        amount=money_to_pb(entry.amount),
        kind=_KIND_TO_PB[entry.kind],
        source=entry.source,
        create_time=time_to_pb(entry.create_time),
        description=entry.description,
        grant="" if entry.grant_id is None else f"{account}/grants/{entry.grant_id}",
    )


def settlements_from_pb(
    messages: Iterable[credit_slice_service_pb2.Settlement],
) -> list[Settlement]:
    """Reads a batch.

    Raises:
        InvalidArgument: names the bad field of each bad settlement, at most 16 of them.
    """
    settlements: list[Settlement] = []
    violations: list[Violation] = []
    for index, message in enumerate(messages):
        try:
            settlements.append(_settlement_from_pb(message))
        except InvalidArgument as error:
            violations += [
                Violation(f"settlements[{index}].{item.field}", item.rule, item.description)
                for item in error.violations
            ]
    if violations:
        first = violations[0]
        raise InvalidArgument(
            f"{first.field}: {first.description}",
            metadata={"field": first.field},
            violations=violations[:_VIOLATIONS_MAX],
        )
    return settlements


@lru_cache(maxsize=4096)
def _ids_of(
    account: str, project: str, api_key: str, offering: str, model_version: str, price: str
) -> tuple[str, ...]:
    """Reads the names of a settlement, which come together again and again: all in one look."""
    return (
        account_id_of(account, "account"),
        project_id_of(project, "project"),
        *ids_of(api_key, "apiKeys/*", "api_key"),
        offering_id_of(offering, "offering"),
        *ids_of(model_version, "models/*/versions/*", "model_version"),
        price_id_of(price, "price"),
    )


def _settlement_from_pb(message: credit_slice_service_pb2.Settlement) -> Settlement:
    account_id, project_id, api_key_id, offering_id, model_id, version_id, price_id = _ids_of(
        message.account,
        message.project,
        message.api_key,
        message.offering,
        message.model_version,
        message.price,
    )
    usage = message.usage
    input_tokens = _tokens(usage.input_tokens, "usage.input_tokens")
    output_tokens = _tokens(usage.output_tokens, "usage.output_tokens")
    return Settlement(
        generation_id=text_of(message.generation_id, "generation_id"),
        slice_id=text_of(message.slice_id, "slice_id"),
        account_id=account_id,
        project_id=project_id,
        api_key_id=api_key_id,
        offering_id=offering_id,
        model_id=model_id,
        version_id=version_id,
        price_id=price_id,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cached_input_tokens=_part(
            usage.cached_input_tokens, input_tokens, "usage.cached_input_tokens"
        ),
        reasoning_tokens=_part(usage.reasoning_tokens, output_tokens, "usage.reasoning_tokens"),
        end_cause=_END_CAUSES[message.end_cause],
        start_time=time_from_pb(message.start_time, "start_time"),
        end_time=time_from_pb(message.end_time, "end_time"),
        request_id=text_of(message.request_id, "request_id"),
        request_sha256=_request_sha256(message),
        labels=_labels(message.labels) if message.labels else NO_LABELS,
        end_user=text_of(message.end_user, "end_user"),
        engine_time_us=_engine_time_us(message),
        is_background=message.background,
        receipt=_receipt(message.receipt) if message.HasField("receipt") else None,
    )


def _receipt(message: receipt_pb2.SignedReceipt) -> Receipt:
    """Takes what the client got as it is: what is wrong with it never stops a settlement."""
    return Receipt(content=message.receipt, key_id=message.key_id, signature=message.signature)


def _engine_time_us(message: credit_slice_service_pb2.Settlement) -> int:
    if not message.HasField("engine_time"):
        return 0
    told = message.engine_time
    # Cheaper than Duration.ToTimedelta, once for each settlement.
    microseconds = told.seconds * 1_000_000 + told.nanos // 1000
    if not 0 <= microseconds <= ENGINE_TIME_MAX_US:
        raise invalid_field(
            "engine_time", FieldRule.OUT_OF_RANGE, f"must be 0 to {ENGINE_TIME_MAX_US} microseconds"
        )
    return microseconds


def _labels(labels: Mapping[str, str]) -> dict[str, str]:
    return {text_of(key, "labels"): text_of(value, "labels") for key, value in labels.items()}


def _request_sha256(message: credit_slice_service_pb2.Settlement) -> bytes:
    digest = message.request_sha256
    if digest and len(digest) != _SHA256_BYTES:
        raise invalid_field(
            "request_sha256", FieldRule.BAD_FORMAT, f"must be {_SHA256_BYTES} bytes or empty"
        )
    if digest and not message.request_id:
        raise invalid_field(
            "request_sha256", FieldRule.CONFLICTING, "must be empty without request_id"
        )
    return digest


def _tokens(count: int, field: str) -> int:
    if not 0 <= count <= TOKENS_MAX:
        raise invalid_field(field, FieldRule.OUT_OF_RANGE, f"must be between 0 and {TOKENS_MAX}")
    return count


def _part(count: int, whole: int, field: str) -> int:
    if not 0 <= count <= whole:
        raise invalid_field(
            field, FieldRule.OUT_OF_RANGE, f"must be between 0 and {whole}, of which it is a part"
        )
    return count


def record_to_pb(record: UsageRecord) -> ledger_pb2.UsageRecord:
    """Writes a usage record."""
    told = record.settlement
    return ledger_pb2.UsageRecord(
        name=f"{account_name(told.account_id)}/usageRecords/{told.generation_id}",
        generation_id=told.generation_id,
        project=f"projects/{told.project_id}",
        api_key=f"apiKeys/{told.api_key_id}",
        offering=f"offerings/{told.offering_id}",
        model_version=f"models/{told.model_id}/versions/{told.version_id}",
        price=f"prices/{told.price_id}",
        usage=usage_pb2.TokenUsage(
            input_tokens=told.input_tokens,
            output_tokens=told.output_tokens,
            cached_input_tokens=told.cached_input_tokens,
            reasoning_tokens=told.reasoning_tokens,
        ),
        charge=money_to_pb(record.charge),
        end_cause=ledger_pb2.EndCause.ValueType(told.end_cause.value),
        start_time=time_to_pb(told.start_time),
        end_time=time_to_pb(told.end_time),
        settle_time=time_to_pb(record.settle_time),
        request_id=told.request_id,
        labels=told.labels,
        end_user=told.end_user,
        engine_time=_engine_time_to_pb(told.engine_time_us),
        background=told.is_background,
        refunded=money_to_pb(record.refunded),
    )


def _engine_time_to_pb(microseconds: int) -> Duration:
    seconds, rest = divmod(microseconds, 1_000_000)
    return Duration(seconds=seconds, nanos=rest * 1000)
