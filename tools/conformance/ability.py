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
from tools.conformance.probes import OUTPUTS_MAX, PROBES, Probe
from tools.conformance.requests import Request
from tools.conformance.trial import Trial
from tools.conformance.verdict import CannotShow, Mismatch, expect, expect_equal

_LEVELS = (
    FLAGS,
    # With a true flag above them they are looked at themselves.
    ("tool_calls", "reasoning", "max_top_logprobs"),
    ("strict_tools",),
)
"""What another deployment has switched off, one after the other."""
_UNKNOWN_ENUM = 99
_OVER = 1_000_000.0
_DURATIONS = ((0, 0), (0, 999_999), (-1, 0), (86_400, 1))
"""Seconds and nanoseconds that are no max_duration: below a millisecond, above a day."""
_TOO_MANY = "has too many"
_IS_MISSING = "is missing"
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
        shown, refused = await _both_directions(trial, tenant, capabilities)
        before = await books.posted()
        await _refusals(tenant, capabilities)
        expect_equal(before - await books.posted(), 0, "nanos taken for what was refused")
    trial.show(f"{shown} flags are true and work, {refused} are false and refused with their path")
    if trial.deployment.disabled is None:
        if not refused:
            trial.lack("refusals: this deployment can do everything")
        return
    for flags in _LEVELS:
        async with trial.deployment.disabled(flags) as other, Trial(other) as second:
            await _all_refused(second, flags)
    trial.show("where an operator has switched all of them off, all are refused at no cost")


async def _all_refused(trial: Trial, flags: tuple[str, ...]) -> None:
    books = trial.require_books()
    async with trial.tenant() as tenant:
        capabilities = (await tenant.capabilities()).capabilities
        asked = [flag for flag in flags if _asks(PROBES[flag])]
        # A request always has one output.
        on = [flag for flag in asked if getattr(capabilities, flag) > (flag == "max_outputs")]
        expect(not on, f"flags that were switched off are true: {on}")
        before = await books.posted()
        await _refusals(tenant, capabilities)
        expect_equal(before - await books.posted(), 0, "nanos taken for what was refused")


def _asks(probe: Probe) -> bool:
    return probe.make is not None


async def _both_directions(
    trial: Trial, tenant: Tenant, capabilities: capabilities_pb2.Capabilities
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
        except CannotShow as reason:
            trial.lack(f"{flag}: {reason}")
            continue
        shown += 1
    return shown, refused


async def _refusals(tenant: Tenant, capabilities: capabilities_pb2.Capabilities) -> None:
    """Asks for everything that flags deny, and for one more than a number allows."""
    for flag, probe in PROBES.items():
        if probe.make is None:
            continue
        number = int(getattr(capabilities, flag))
        if flag in NUMBERS and (number or flag == "max_outputs"):
            await _too_many(tenant, flag, probe, number)
        elif not number:
            await _unsupported(tenant, flag, probe, capabilities)


async def _unsupported(
    tenant: Tenant, flag: str, probe: Probe, capabilities: capabilities_pb2.Capabilities
) -> None:
    """Asks for what a model cannot do; the first thing of it that it cannot do is named."""
    assert probe.make is not None
    named = next((name for name in probe.under if not getattr(capabilities, name)), flag)
    asked = [(named, PROBES[named].path, probe.make(tenant, 1))]
    asked += [(flag, path, make(tenant)) for path, make in probe.also.items()]
    for feature, path, request in asked:
        what = f"{flag} is false, {path}"
        refusal = await refused(tenant, request, what)
        refusal.expect(Code.INVALID_ARGUMENT, Reason.FEATURE_UNSUPPORTED, what)
        expect_equal(refusal.fields, (path,), f"field of the refusal, {what}")
        expect_equal(refusal.metadata.get("feature"), feature, f"feature of the refusal, {what}")


async def _too_many(tenant: Tenant, flag: str, probe: Probe, number: int) -> None:
    assert probe.make is not None
    if flag == "max_outputs":
        number = max(number, 1)
        if number >= OUTPUTS_MAX:
            return
    refusal = await refused(tenant, probe.make(tenant, number + 1), f"{flag} is {number}")
    what = f"one more than {flag} {number}"
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
            await _broken(tenant, spec, f"spec.{breach.into(spec)}", breach.how)
            fields += 1
        for seconds, nanos in _DURATIONS:
            spec = generation_pb2.GenerationSpec(model=tenant.model, text="x")
            spec.max_duration.seconds, spec.max_duration.nanos = seconds, nanos
            await _broken(tenant, spec, "spec.max_duration", f"is {seconds} s and {nanos} ns")
            fields += 1
        for breach in breaches(embedding_service_pb2.EmbedRequest.DESCRIPTOR):
            # The client puts the model in.
            if breach.way[-1].name != "model":
                request = embedding_service_pb2.EmbedRequest()
                path = breach.into(request)
                if not request.inputs and breach.way[0].name != "inputs":
                    request.inputs.add(text="x")
                await _broken(tenant, request, path, breach.how)
                fields += 1
        await _unknown_model(tenant)
    expect_equal(before - await books.posted(), 0, "nanos taken for what was refused")
    trial.show(f"{fields} bounds of the contract broken one by one, all refused with their path")


async def _broken(tenant: Tenant, request: Request, path: str, how: str) -> None:
    what = f"{path} {how}"
    refusal = await refused(tenant, request, what)
    is_invalid = refusal.code is Code.INVALID_ARGUMENT
    expect(is_invalid, f"{what}: expected INVALID_ARGUMENT, got {refusal}")
    expect(path in refusal.fields, f"{what}: named {refusal.fields} instead")


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
            return field.name if self.how == _TOO_MANY else f"{field.name}{entry}"
        if isinstance(self.value, list):
            getattr(at, field.name).extend(self.value)
            is_whole = self.how in {_TOO_MANY, _IS_MISSING}
            return field.name if is_whole else f"{field.name}[0]"
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
                yield Breach(here, [empty] * (rules.max_items + 1), _TOO_MANY)
            if rules.required and field.is_repeated:
                yield Breach(here, [], _IS_MISSING)
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
    if rules.required:
        yield Breach(way, [] if field.is_repeated else field.default_value, _IS_MISSING)
    if rules.HasField("lte"):
        yield one(int(rules.lte) + 1 if is_whole else rules.lte + 1, "is too large")
    if rules.HasField("gte") and is_whole and field.has_presence:
        yield one(int(rules.gte) - 1, "is too small")
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
        yield Breach(way, [item] * (rules.max_items + 1), _TOO_MANY)


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
        yield Breach(way, many, _TOO_MANY)
    if rules.HasField("lte"):
        yield Breach(way, {1: _OVER}, "has a value that is too large")
        yield Breach(way, {1: -_OVER}, "has a value that is too small")
        yield Breach(way, {1: float("nan")}, "has a value that is not a number")
    if rules.HasField("max_bytes"):
        yield Breach(way, {"k": "x" * (rules.max_bytes + 1)}, "has a value that is too long")
    if rules.pattern:
        yield Breach(way, {"No Key": good}, "has a key of a bad form")
