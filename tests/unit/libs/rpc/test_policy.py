"""libs/rpc/policy.py, and what every method and field of the contract has to keep."""

from __future__ import annotations

import json
import re

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from grpc_health.v1 import health_pb2
from maas.common.v1 import capabilities_pb2, options_pb2

from libs.rpc.policy import Audience, policies_of, policy_of, service_config
from tests.unit.libs.rpc.contract import files, messages, methods, services

NUMBERS = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
    FieldDescriptor.CPPTYPE_DOUBLE,
    FieldDescriptor.CPPTYPE_FLOAT,
}
FLOATS = {FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT}
TEXTS = {FieldDescriptor.CPPTYPE_STRING}


def options_of(method: MethodDescriptor) -> options_pb2.MethodPolicy:
    found = method.GetOptions().Extensions[options_pb2.method_policy]
    assert isinstance(found, options_pb2.MethodPolicy)
    return found


def rules_of(field: FieldDescriptor) -> options_pb2.FieldRules:
    found = field.GetOptions().Extensions[options_pb2.rules]
    assert isinstance(found, options_pb2.FieldRules)
    return found


every_method = pytest.mark.parametrize("method", methods(), ids=lambda item: item.full_name)


def test_contract_is_found() -> None:
    assert len(files()) >= 20
    assert len(methods()) >= 40


@every_method
def test_method_has_a_whole_policy(method: MethodDescriptor) -> None:
    options = options_of(method)
    policy = policy_of(method)

    assert policy.method == f"{method.containing_service.full_name}/{method.name}"
    assert options.audience != options_pb2.AUDIENCE_UNSPECIFIED
    assert options.retry_mode != options_pb2.RETRY_MODE_UNSPECIFIED
    if policy.audience in {Audience.INTERNAL, Audience.ANONYMOUS}:
        # The allow-list of the server's configuration decides.
        assert policy.permission == ""
    else:
        assert re.fullmatch(r"[a-z][A-Za-z]*\.[a-z][A-Za-z]*", policy.permission)


@every_method
def test_what_is_safe_to_repeat_is_declared_idempotent(method: MethodDescriptor) -> None:
    level = method.GetOptions().idempotency_level
    mode = options_of(method).retry_mode

    if mode == options_pb2.RETRY_MODE_SAFE:
        assert level != descriptor_pb2.MethodOptions.IDEMPOTENCY_UNKNOWN
    if mode == options_pb2.RETRY_MODE_WITH_REQUEST_ID:
        assert "request_id" in {field.name for field in reachable(method.input_type, set())}


@every_method
def test_only_streams_may_be_endless(method: MethodDescriptor) -> None:
    policy = policy_of(method)

    if policy.default_deadline_s is None:
        assert method.server_streaming
        assert policy.audience is Audience.INTERNAL
    else:
        assert 0 < policy.default_deadline_s <= 600


@every_method
def test_verb_and_permission_agree(method: MethodDescriptor) -> None:
    policy = policy_of(method)
    if policy.permission and method.name.startswith(("Get", "List", "Create", "Revoke")):
        verb = re.split(r"(?=[A-Z])", method.name)[1].lower()
        assert policy.permission.endswith(f".{verb}")


@every_method
def test_lists_and_watches_have_one_shape(method: MethodDescriptor) -> None:
    if method.name.startswith("List"):
        assert {"page_size", "page_token"} <= set(method.input_type.fields_by_name)
        assert "next_page_token" in method.output_type.fields_by_name
    if method.name.startswith("Watch"):
        assert method.server_streaming
        assert policy_of(method).default_deadline_s is None
        assert "snapshot_complete" in method.output_type.fields_by_name


def kinds(field: FieldDescriptor) -> list[FieldDescriptor]:
    """The field itself; of a map its key and its value."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return list(field.message_type.fields)
    return [field]


@pytest.mark.parametrize("message", list(messages()), ids=lambda item: item.full_name)
def test_rules_fit_their_fields(message: Descriptor) -> None:
    for field in message.fields:
        rules = rules_of(field)
        where = field.full_name
        if rules.HasField("gte") or rules.HasField("lte"):
            assert any(kind.cpp_type in NUMBERS for kind in kinds(field)), where
        if rules.HasField("gte") and rules.HasField("lte"):
            assert rules.gte < rules.lte, where
        if rules.HasField("max_bytes"):
            assert any(kind.cpp_type in TEXTS for kind in kinds(field)), where
            assert rules.max_bytes > 0, where
        if rules.HasField("max_items"):
            assert field.is_repeated, where
            assert rules.max_items > 0, where
        if rules.pattern:
            assert kinds(field)[0].type == FieldDescriptor.TYPE_STRING, where
            re.compile(rules.pattern)
        if rules.defined_only:
            assert field.enum_type is not None, where
        if rules.needs:
            assert rules.needs in capabilities_pb2.Capabilities.DESCRIPTOR.fields_by_name, where


def reachable(message: Descriptor, seen: set[str]) -> list[FieldDescriptor]:
    """Fields of a request, through all its messages of ours."""
    if message.full_name in seen or not message.full_name.startswith("maas."):
        return []
    seen.add(message.full_name)
    found = list(message.fields)
    for field in message.fields:
        if field.message_type is not None:
            found += reachable(field.message_type, seen)
    return found


def owner_of(field: FieldDescriptor) -> Descriptor:
    """The message that a field belongs to."""
    assert field.containing_type is not None
    return field.containing_type


def from_outside() -> list[FieldDescriptor]:
    """Fields of all requests that do not come from services of the suite."""
    seen: set[str] = set()
    return [
        field
        for method in methods()
        if policy_of(method).audience is not Audience.INTERNAL
        for field in reachable(method.input_type, seen)
        if not owner_of(field).GetOptions().map_entry
    ]


def test_floats_that_come_in_from_outside_have_both_bounds() -> None:
    for field in from_outside():
        if any(kind.cpp_type in FLOATS for kind in kinds(field)):
            assert rules_of(field).HasField("gte"), field.full_name
            assert rules_of(field).HasField("lte"), field.full_name


def test_lists_that_come_in_from_outside_are_bounded() -> None:
    for field in from_outside():
        if field.is_repeated:
            assert rules_of(field).HasField("max_items"), field.full_name


def test_texts_in_requests_to_the_token_api_are_bounded() -> None:
    for field in from_outside():
        if owner_of(field).file.package == "maas.inference.v1" and any(
            kind.cpp_type in TEXTS for kind in kinds(field)
        ):
            rules = rules_of(field)
            # A pattern with a count in braces is a bound too.
            assert rules.HasField("max_bytes") or rules.pattern.endswith("}"), field.full_name


def test_no_request_is_recursive() -> None:
    def walk(message: Descriptor, above: tuple[str, ...]) -> None:
        assert message.full_name not in above, message.full_name
        for field in message.fields:
            inner = field.message_type
            if inner is not None and inner.full_name.startswith("maas."):
                walk(inner, (*above, message.full_name))

    for method in methods():
        walk(method.input_type, ())


def test_service_config_retries_what_is_safe_and_bounded() -> None:
    config = json.loads(service_config(services()))

    (entry,) = config["methodConfig"]
    named = {f"{item['service']}/{item['method']}" for item in entry["name"]}
    assert named == {
        policy.method
        for service in services()
        for policy in policies_of(service).values()
        if policy.is_retry_safe and policy.default_deadline_s is not None
    }
    assert "maas.auth.v1.ApiKeyService/CreateApiKey" not in named
    assert entry["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
    assert entry["retryPolicy"]["maxAttempts"] <= 5, "gRPC takes no more"


def test_service_config_of_nothing_is_empty() -> None:
    assert json.loads(service_config([]))["methodConfig"] == []


def test_method_without_a_policy_is_refused() -> None:
    assert health_pb2.DESCRIPTOR.package == "grpc.health.v1"
    foreign = descriptor_pool.Default().FindServiceByName("grpc.health.v1.Health")

    with pytest.raises(ValueError, match="has no method_policy"):
        policies_of(foreign)
