"""libs/errors.py: one table, the same as the contract's."""

from __future__ import annotations

import pytest
from google.rpc import code_pb2
from maas.common.v1 import errors_pb2

from libs import errors
from libs.errors import BY_CODE, Code, FieldRule, MaasError, Reason

PREFIX = "ERROR_REASON_"


def test_reasons_are_those_of_the_contract() -> None:
    contract = {
        value.name.removeprefix(PREFIX)
        for value in errors_pb2.ErrorReason.DESCRIPTOR.values
        if value.number != 0
    }

    assert {reason.value for reason in Reason} == contract
    assert all(reason.name == reason.value for reason in Reason)


def test_codes_have_the_numbers_of_google() -> None:
    assert {code.name: code.value for code in Code} == {
        name: number for name, number in code_pb2.Code.items() if name != "OK"
    }


def test_every_error_class_has_a_code_of_its_own() -> None:
    classes = MaasError.__subclasses__()

    assert set(BY_CODE.values()) == set(classes)
    assert all(BY_CODE[kind.code] is kind for kind in classes)


def test_field_rules_are_those_that_the_contract_names() -> None:
    contract = "REQUIRED OUT_OF_RANGE TOO_LONG TOO_MANY BAD_FORMAT CONFLICTING UNKNOWN_ENUM"

    assert {rule.value for rule in FieldRule} == {*contract.split(), "UNSUPPORTED"}


@pytest.mark.parametrize("kind", BY_CODE.values())
def test_error_takes_the_reason_of_its_class(kind: type[MaasError]) -> None:
    error = kind("what happened")

    assert (error.message, error.reason) == ("what happened", kind.default_reason)
    assert (error.metadata, error.violations, error.retry_after_s) == ({}, (), None)


def test_error_does_not_keep_the_callers_mapping() -> None:
    metadata = {"field": "a"}
    error = errors.InvalidArgument("bad", metadata=metadata)
    metadata["field"] = "b"

    assert error.metadata == {"field": "a"}


def test_makers_fill_in_what_the_contract_promises() -> None:
    bad = errors.invalid_field("spec.text", FieldRule.REQUIRED, "must not be empty")
    assert bad.metadata == {"field": "spec.text"}
    assert [(item.field, item.rule) for item in bad.violations] == [
        ("spec.text", FieldRule.REQUIRED)
    ]
    assert errors.not_found("offerings/x").metadata == {"resource": "offerings/x"}
    assert errors.already_exists("offerings/x").metadata == {"resource": "offerings/x"}
    away = errors.unavailable("postgresql")
    assert away.metadata == {"dependency": "postgresql"}
    assert away.retry_after_s is not None
