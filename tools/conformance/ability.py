"""Features of what a model can do, and of what it refuses: C-4, W-4."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from maas.common.v1 import capabilities_pb2, options_pb2
from maas.inference.v1 import embedding_service_pb2, generation_pb2

from libs.capabilities import FLAGS, NUMBERS
from libs.errors import Code, Reason
from tools.conformance.client import Refusal, Tenant
from tools.conformance.probes import OUTPUTS_MAX, PROBES, Probe, Request
from tools.conformance.trial import Trial
from tools.conformance.verdict import Mismatch, expect, expect_equal

_UNKNOWN_ENUM = 99
_OVER = 1_000_000.0
_NUMBERS = (
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
    FieldDescriptor.CPPTYPE_FLOAT,
    FieldDescriptor.CPPTYPE_DOUBLE,
)


async def flags_are_true(trial: Trial) -> None:
    """C-4: what a flag says is so in both directions; no refusal costs anything."""
    books = trial.require_books()
    async with trial.tenant() as tenant:
        capabilities = (await tenant.capabilities()).capabilities
        shown, refused = await _both_directions(tenant, capabilities)
        before = await books.posted()
        await _refusals(tenant, capabilities)
        expect_equal(before - await books.posted(), 0, "nanos taken for what was refused")
    trial.show(f"{shown} flags are true and work, {refused} are false and refused with their path")
    if trial.deployment.disabled is None:
        if not refused:
            trial.lack("refusals: this deployment can do everything")
        return
    async with trial.deployment.disabled() as other, Trial(other) as second:
        await _all_refused(second)
    trial.show("where an operator has switched all of them off, all are refused at no cost")


async def _all_refused(trial: Trial) -> None:
    books = trial.require_books()
    async with trial.tenant() as tenant:
        capabilities = (await tenant.capabilities()).capabilities
        on = [flag for flag in FLAGS if _asks(PROBES[flag]) and getattr(capabilities, flag)]
        expect(on in ([], ["max_outputs"]), f"flags that were switched off are true: {on}")
        before = await books.posted()
        await _refusals(tenant, capabilities)
        expect_equal(before - await books.posted(), 0, "nanos taken for what was refused")


def _asks(probe: Probe) -> bool:
    return probe.make is not None


async def _both_directions(
    tenant: Tenant, capabilities: capabilities_pb2.Capabilities
) -> tuple[int, int]:
    """Shows what is true; counts that, and what is false."""
    shown = refused = 0
    for flag, probe in PROBES.items():
        number = int(getattr(capabilities, flag))
        if not number:
            refused += _asks(probe)
            continue
        try:
            await probe.show(tenant, number)
        except Refusal as refusal:
            raise Mismatch(f"{flag} is {number}, but its use was refused: {refusal}") from refusal
        except Mismatch as mismatch:
            raise Mismatch(f"{flag}: {mismatch}") from mismatch
        shown += 1
    return shown, refused


async def _refusals(tenant: Tenant, capabilities: capabilities_pb2.Capabilities) -> None:
    """Asks for everything that flags deny, and for one more than a number allows."""
    for flag, probe in PROBES.items():
        if probe.make is None:
            continue
        number = int(getattr(capabilities, flag))
        if flag in NUMBERS:
            await _too_many(tenant, flag, probe, capabilities)
        elif not number:
            refusal = await refused(tenant, probe.make(tenant, 1), f"{flag} is false")
            refusal.expect(Code.INVALID_ARGUMENT, Reason.FEATURE_UNSUPPORTED, f"{flag} is false")
            _names(refusal, flag, capabilities)


def _names(refusal: Refusal, flag: str, capabilities: capabilities_pb2.Capabilities) -> None:
    """Sees that a refusal names the field of the flag, or another that the request needs too."""
    feature = refusal.metadata.get("feature", "")
    expect(feature in PROBES, f"the refusal for {flag} names no feature")
    if feature != flag:
        is_denied = not getattr(capabilities, feature)
        expect(is_denied, f"the refusal for {flag} names {feature}, which is true")
    expect_equal(refusal.fields, (PROBES[feature].path,), f"field of the refusal for {flag}")


async def _too_many(
    tenant: Tenant, flag: str, probe: Probe, capabilities: capabilities_pb2.Capabilities
) -> None:
    assert probe.make is not None
    number = int(getattr(capabilities, flag))
    if flag == "max_outputs":
        number = max(number, 1)
        if number >= OUTPUTS_MAX:
            return
    refusal = await refused(tenant, probe.make(tenant, number + 1), f"{flag} is {number}")
    what = f"one more than {flag} {number}"
    if refusal.reason == Reason.FEATURE_UNSUPPORTED.value:
        expect(not number, f"{what}: expected a bound, got {refusal}")
        _names(refusal, flag, capabilities)
        return
    expect(refusal.code is Code.INVALID_ARGUMENT, f"{what}: expected INVALID_ARGUMENT: {refusal}")
    expect(probe.path in refusal.fields, f"{what}: expected {probe.path}, got {refusal.fields}")


async def refused(tenant: Tenant, request: Request, what: str) -> Refusal:
    """Sends a request that has to be refused.

    Raises:
        Mismatch: it was not.
    """
    try:
        if isinstance(request, embedding_service_pb2.EmbedRequest):
            await tenant.embed(request)
        else:
            await tenant.generate(request)
    except Refusal as refusal:
        return refusal
    raise Mismatch(f"{what}: expected a refusal, got an answer")


async def bounds_are_kept(trial: Trial) -> None:
    """W-4: each field's bound, taken from the contract, is enforced with the field's path."""
    books = trial.require_books()
    before = await books.posted()
    fields = 0
    async with trial.tenant() as tenant:
        for breach in breaches(generation_pb2.GenerationSpec.DESCRIPTOR):
            spec = generation_pb2.GenerationSpec(model=tenant.model, text="x")
            path = breach.into(spec)
            refusal = await refused(tenant, spec, f"{path} {breach.how}")
            what = f"{path} {breach.how}"
            expect(
                refusal.code is Code.INVALID_ARGUMENT,
                f"{what}: expected INVALID_ARGUMENT, got {refusal}",
            )
            expect(f"spec.{path}" in refusal.fields, f"{what}: named {refusal.fields} instead")
            fields += 1
        await _unknown_model(tenant)
    expect_equal(before - await books.posted(), 0, "nanos taken for what was refused")
    trial.show(f"{fields} bounds of the contract broken one by one, all refused with their path")


async def _unknown_model(tenant: Tenant) -> None:
    spec = generation_pb2.GenerationSpec(model="none-such", text="x")
    refusal = await refused(tenant, spec, "an unknown model")
    refusal.expect(Code.NOT_FOUND, Reason.RESOURCE_NOT_FOUND, "an unknown model")


@dataclass(frozen=True, slots=True)
class Breach:
    """One bound of one field, to be broken.

    Attributes:
        way: fields that lead to it, from the spec on; the last one has the bound.
        value: that breaks it; for a map an entry, for a list all items.
        how: for people.
    """

    way: tuple[FieldDescriptor, ...]
    value: object
    how: str

    def into(self, spec: Message) -> str:
        """Puts the value into a spec; returns the path that a refusal has to name."""
        parts: list[str] = []
        at = spec
        for field in self.way[:-1]:
            inner = getattr(at, field.name)
            if field.is_repeated:
                at = inner.add()
                parts.append(f"{field.name}[0]")
            else:
                inner.SetInParent()
                at = inner
                parts.append(field.name)
        return ".".join([*parts, self._put(at)])

    def _put(self, at: Message) -> str:
        field = self.way[-1]
        if isinstance(self.value, dict):
            getattr(at, field.name).update(self.value)
            # A key that is not allowed is named by its place.
            key = next(iter(self.value))
            is_named = len(self.value) == 1 and self.how != "has a key of a bad form"
            entry = f"[{key}]" if is_named else ".key[0]"
            return field.name if self.how == "has too many" else f"{field.name}{entry}"
        if isinstance(self.value, list):
            getattr(at, field.name).extend(self.value)
            return field.name if self.how == "has too many" else f"{field.name}[0]"
        setattr(at, field.name, self.value)
        return field.name


def breaches(descriptor: Descriptor) -> Iterator[Breach]:
    """Every way to break a bound of a request, by field."""
    yield from _inside(descriptor, ())


def _inside(descriptor: Descriptor, way: tuple[FieldDescriptor, ...]) -> Iterator[Breach]:
    for field in descriptor.fields:
        here = (*way, field)
        rules = field.GetOptions().Extensions[options_pb2.rules]
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            yield from _of_map(field, rules, here)
        elif field.message_type is None:
            yield from _of_value(field, rules, here)
        elif field.message_type.full_name.startswith("maas."):
            if rules.HasField("max_items"):
                empty = message_factory.GetMessageClass(field.message_type)()
                yield Breach(here, [empty] * (rules.max_items + 1), "has too many")
            yield from _inside(field.message_type, here)


def _of_value(
    field: FieldDescriptor, rules: options_pb2.FieldRules, way: tuple[FieldDescriptor, ...]
) -> Iterator[Breach]:
    def one(value: object, how: str) -> Breach:
        return Breach(way, [value] if field.is_repeated else value, how)

    is_whole = field.cpp_type not in (
        FieldDescriptor.CPPTYPE_FLOAT,
        FieldDescriptor.CPPTYPE_DOUBLE,
    )
    if rules.HasField("lte"):
        yield one(int(rules.lte) + 1 if is_whole else rules.lte + 1, "is too large")
    if rules.HasField("gte") and not is_whole:
        yield one(rules.gte - 1, "is too small")
        yield one(float("nan"), "is not a number")
    if rules.HasField("max_bytes") and field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        yield one("x" * (rules.max_bytes + 1), "is too long")
    if rules.pattern:
        yield one("\u00e9 \n", "has a bad form")
    if rules.defined_only:
        yield one(_UNKNOWN_ENUM, "is an unknown value")
    # A million items of the token path would be a large request: that bound has its own test.
    if rules.HasField("max_items") and rules.max_items <= 1024:  # noqa: PLR2004 - see above
        item = "x" if field.cpp_type == FieldDescriptor.CPPTYPE_STRING else 1
        yield Breach(way, [item] * (rules.max_items + 1), "has too many")


def _of_map(
    field: FieldDescriptor, rules: options_pb2.FieldRules, way: tuple[FieldDescriptor, ...]
) -> Iterator[Breach]:
    assert field.message_type is not None
    value = field.message_type.fields_by_name["value"]
    is_number = value.cpp_type in _NUMBERS
    good: object = 1.0 if is_number else "x"
    if rules.HasField("max_items"):
        keys = range(rules.max_items + 1)
        many = {key if is_number else f"k{key}": good for key in keys}
        yield Breach(way, many, "has too many")
    if rules.HasField("lte"):
        yield Breach(way, {1: _OVER}, "has a value that is too large")
        yield Breach(way, {1: -_OVER}, "has a value that is too small")
        yield Breach(way, {1: float("nan")}, "has a value that is not a number")
    if rules.HasField("max_bytes"):
        yield Breach(way, {"k": "x" * (rules.max_bytes + 1)}, "has a value that is too long")
    if rules.pattern:
        yield Breach(way, {"No Key": good}, "has a key of a bad form")
