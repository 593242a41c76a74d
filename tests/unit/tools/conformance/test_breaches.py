"""The ways to break a bound of a request, against what enforces them."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from maas.inference.v1 import embedding_service_pb2, generation_pb2

from libs.errors import InvalidArgument
from libs.rpc.validation import Validator
from tools.conformance.ability import breaches

REQUESTS: tuple[Message, ...] = (
    generation_pb2.GenerationSpec(model="m", text="x"),
    embedding_service_pb2.EmbedRequest(model="m"),
)


def breached(request: Message) -> list[tuple[str, str, list[str]]]:
    """Path, how it is broken, and the paths that the validator names."""
    found = []
    descriptor = request.DESCRIPTOR
    assert isinstance(descriptor, Descriptor)
    for breach in breaches(descriptor):
        broken = type(request)()
        broken.CopyFrom(request)
        path = breach.into(broken)
        with pytest.raises(InvalidArgument) as caught:
            Validator().check(broken)
        found.append((path, breach.how, [item.field for item in caught.value.violations]))
    return found


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda item: item.DESCRIPTOR.name)
def test_every_breach_is_refused_with_its_path(request_: Message) -> None:
    assert [(path, how) for path, how, named in breached(request_) if path not in named] == []


def test_request_without_a_breach_is_accepted() -> None:
    Validator().check(REQUESTS[0])


def test_every_kind_of_bound_is_broken() -> None:
    kinds = {(path, how) for path, how, _ in breached(REQUESTS[0])}

    assert {
        ("sampling.temperature", "is too large"),
        ("sampling.temperature", "is too small"),
        ("sampling.temperature", "is not a number"),
        ("stop.max_output_tokens", "is too small"),
        ("sampling.logit_bias[1]", "has a value that is too large"),
        ("labels", "has too many"),
        ("labels.key[0]", "has a key of a bad form"),
        ("labels[k]", "has a value that is too long"),
        ("chat.messages", "has too many"),
        ("chat.messages", "is missing"),
        ("chat.messages[0].role", "is an unknown value"),
        ("tools.tools[0].name", "has a bad form"),
        ("constraint.regex", "is missing"),
        ("end_user", "is too long"),
    } <= kinds
