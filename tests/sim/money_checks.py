"""What must hold when everything has drained: nothing is held, each bill is what was received."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from maas.inference.v1 import generation_pb2

from libs.errors import Internal, Unavailable
from services.gateway.domain import EndCause
from tests.sim.money_gateway import LIMITED, RECEIPT_KEYS, REQUESTS_A_MINUTE

if TYPE_CHECKING:
    from tests.sim.money_billing import Record
    from tests.sim.money_clients import Ask
    from tests.sim.money_world import World

# Most tokens that a client who reads pays for and has not received.
OVER_MAX = 64
# Whoever is away for less gives its slices back itself.
AWAY_S = 2.5
# Said when the disk is full, and only then.
_OF_FULL_DISKS = {"journal failed", "journal lost an end"}


def check_logs(world: World, logs: Sequence[MutableMapping[str, Any]]) -> None:
    """No defect was logged and passed over."""
    for entry in logs:
        if entry["log_level"] in {"error", "critical"}:
            is_expected = entry["event"] in _OF_FULL_DISKS and world.faults.full_disks
            world.claim(bool(is_expected), f"logged {entry}")


def check_drained(world: World) -> None:
    """Checks everything."""
    _check_slices(world)
    _check_records(world)
    for ask in world.asks:
        _check_ask(world, ask)
    _check_requests(world)
    _check_rate(world)


def _check_slices(world: World) -> None:
    for gateway in world.gateways:
        world.claim(gateway.is_quiet, f"{gateway.name} is still busy: {gateway.describe()}")
    for slice_id, item in world.billing.ledger.slices.items():
        world.claim(
            item.state in {"closed", "reclaimed"}, f"{slice_id} is {item.state}, holds {item.rest}"
        )
    faults = world.faults
    was_away = faults.longest_s > AWAY_S or faults.power_losses or world.counts["silence"]
    for slice_id, at_s in world.billing.reclaimed_at.items():
        # Nobody leaves it to the sweeper to free a slice who can do so.
        world.claim(bool(was_away), f"{slice_id} was left to the sweeper")
        due_s = world.billing.last_lease.get(slice_id, 0.0) + world.grace_s
        world.claim(at_s >= due_s, f"{slice_id} was reclaimed {due_s - at_s:.1f}s too early")


def _check_records(world: World) -> None:
    """What its slice could not pay came too late: its slice had been reclaimed."""
    for generation_id, record in world.billing.records.items():
        gateway = generation_id.split("_")[1]
        world.claim(record.cause is not EndCause.ENGINE_FAILURE, f"{generation_id} failed")
        if record.lacking:
            world.count("settled late")
            world.claim(
                record.slice_state == "reclaimed",
                f"{generation_id}: its slice, {record.slice_state}, lacked {record.lacking}",
            )
        if generation_id in world.billing.contradicted:
            world.claim(
                gateway
                in {name for name, _ in world.faults.power_losses + world.faults.full_disks},
                f"{generation_id} was settled again with other counts",
            )


def _check_ask(world: World, ask: Ask) -> None:
    for defect in ask.defects:
        world.claim(False, f"{ask.generation_id}: {defect}")
    world.claim(ask.is_over, f"the client of {ask} waits for ever")
    world.claim(not isinstance(ask.error, Internal), f"{ask.generation_id}: {ask.error!r}")
    if not ask.generation_id:
        return
    record = world.billing.records.get(ask.generation_id)
    lost_power = world.faults.hit(world.faults.power_losses, ask)
    if record is None:
        world.claim(lost_power, f"{ask.generation_id} was never settled")
        return
    lease_end_s = world.billing.last_lease.get(record.settlement.slice_id, 0.0)
    world.claim(
        ask.is_repeat or ask.at_s <= lease_end_s,
        f"{ask.generation_id} was admitted on a slice whose lease was over",
    )
    if not record.cause.is_charged:
        _check_free(world, ask, record, lost_power=lost_power)
        return
    _check_cause(world, ask, record)
    if ask.finished is not None:
        _check_clean(world, ask, ask.finished, record)
    else:
        _check_cut(world, ask, record)


def _check_clean(
    world: World,
    ask: Ask,
    finished: generation_pb2.Finished | generation_pb2.Generation,
    record: Record,
) -> None:
    """To the token and the nano."""
    world.count("clean")
    name = ask.generation_id
    world.claim(record.cause is EndCause.COMPLETED, f"{name} completed, billed {record.cause}")
    world.claim(record.usage == finished.usage, f"{name}: told other counts than billed")
    world.claim(
        record.usage.output_tokens == ask.tokens,
        f"{name}: received {ask.tokens}, billed {record.usage.output_tokens}",
    )
    world.claim(
        record.amount == finished.charge.nanos,
        f"{name}: told {finished.charge.nanos} nanos, billed {record.amount}",
    )
    if finished.receipt.receipt:
        signed = finished.receipt
        content = RECEIPT_KEYS.verify(
            receipt=signed.receipt, key_id=signed.key_id, signature=signed.signature
        )
        world.count("receipt")
        world.claim(content.charge_nanos == record.amount, f"{name}: its receipt says otherwise")
        world.claim(record.settlement.receipt == signed, f"{name}: billing has another receipt")


def _check_cut(world: World, ask: Ask, record: Record) -> None:
    """No less than was received, and little more."""
    world.count("cut and charged")
    over = record.usage.output_tokens - ask.tokens
    name = ask.generation_id
    world.claim(over >= 0, f"{name}: received {ask.tokens}, billed {-over} less")
    if not (ask.lives_on or ask.is_unary or ask.reads_s or ask.met_halt or ask.is_repeat):
        world.claim(over <= OVER_MAX, f"{name}: received {ask.tokens}, billed {over} more")
    is_ours = isinstance(ask.error, Unavailable) and not world.faults.hit(world.faults.deaths, ask)
    world.claim(not is_ours, f"{name}: {ask.error!r}, and yet {record.cause} was charged")


def _check_cause(world: World, ask: Ask, record: Record) -> None:
    """Whoever pays has ended it, or had all of it."""
    name, cause = ask.generation_id, record.cause
    whole = min(ask.prompt.output_tokens, ask.max_output_tokens)
    others = [
        other
        for other in world.asks
        if other is ask or (ask.request_id and other.request_id == ask.request_id)
    ]
    if cause is EndCause.COMPLETED:
        made = record.usage.output_tokens
        world.claim(made == whole, f"{name} is said to be complete with {made} of {whole} tokens")
    elif cause is EndCause.CLIENT_CANCELLED:
        has_left = any(other.left_at_s is not None for other in others)
        world.claim(has_left, f"{name} was charged as cancelled, and nobody has left")
    else:
        reads = any(other.reads_s for other in others)
        world.claim(cause is EndCause.STALLED and reads, f"{name} was charged as {cause}")


def _check_free(world: World, ask: Ask, record: Record, *, lost_power: bool) -> None:
    """Nothing where the fault was ours, and only there."""
    world.count("free")
    name = ask.generation_id
    faults = world.faults
    world.claim(record.amount == 0, f"{name} ended by {record.cause}, billed {record.amount}")
    counted = record.usage.output_tokens
    world.claim(
        counted >= ask.tokens or lost_power, f"{name}: received {ask.tokens}, counted {counted}"
    )
    full_disk = faults.hit(faults.full_disks, ask)
    world.claim(
        ask.finished is None or lost_power or full_disk,
        f"{name} was finished, and is recorded as {record.cause}",
    )
    if record.cause is EndCause.GATEWAY_LOST:
        world.claim(full_disk or faults.hit(faults.deaths, ask), f"{name} was free without a fault")
    else:
        world.claim(
            any(at_s >= ask.at_s for at_s in faults.worker_deaths),
            f"{name} ended by {record.cause}, and all workers lived",
        )


def _check_requests(world: World) -> None:
    """A request_id is charged once."""
    charged: dict[tuple[str, str], list[str]] = {}
    for generation_id, record in world.billing.records.items():
        item = record.settlement
        if item.request_id and record.cause.is_charged:
            charged.setdefault((item.project, item.request_id), []).append(generation_id)
    for key, generations in charged.items():
        is_known = len(generations) == 1 or bool(world.faults.power_losses)
        world.claim(is_known, f"{key} was charged for {generations}")


def _check_rate(world: World) -> None:
    """A burst, and what has flowed since; each gateway may be late by a second's worth."""
    account = f"accounts/{LIMITED.organization}"
    admitted = sum(
        record.settlement.account == account for record in world.billing.records.values()
    )
    flowed = REQUESTS_A_MINUTE / 60 * world.loop.time()
    most = REQUESTS_A_MINUTE + flowed + len(world.gateways)
    world.claim(admitted <= most, f"{admitted} requests were admitted, at most {most:.1f} may be")
