"""libs/rpc/identity.py: who may call."""

from __future__ import annotations

from pathlib import Path

import pytest

from libs.auth import KeyTable, sha256_of
from libs.config import ConfigError, IdentitySection
from libs.errors import PermissionDenied, Unauthenticated
from libs.rpc.identity import Identity
from libs.rpc.policy import Audience, MethodPolicy

METHOD = "maas.catalog.v1.OfferingService/WatchOfferings"


def section(
    folder: Path, allow: dict[str, list[str]], digest: str | None = None
) -> IdentitySection:
    callers = {}
    for name in ("gateway", "billing"):
        path = folder / f"{name}.sha256"
        path.write_text(digest or sha256_of(f"ms_{name}").hex())
        callers[name] = path
    return IdentitySection(
        name="catalog", token_file=folder / "token", callers=callers, allow=allow
    )


def policy(audience: Audience) -> MethodPolicy:
    return MethodPolicy(
        method=METHOD,
        audience=audience,
        permission="",
        default_deadline_s=None,
        is_retry_safe=True,
    )


def test_service_on_the_list_gets_in(tmp_path: Path) -> None:
    identity = Identity.from_config(section(tmp_path, {METHOD: ["gateway"]}), KeyTable())

    assert identity.service(METHOD, "ms_gateway") == "gateway"


def test_known_service_that_is_not_on_the_list_is_denied(tmp_path: Path) -> None:
    identity = Identity.from_config(section(tmp_path, {METHOD: ["gateway"]}), KeyTable())

    with pytest.raises(PermissionDenied):
        identity.service(METHOD, "ms_billing")
    with pytest.raises(PermissionDenied):
        identity.service("other.Service/Method", "ms_gateway")


@pytest.mark.parametrize("credential", ["", "ms_stranger", "gateway"])
def test_unknown_token_is_refused(tmp_path: Path, credential: str) -> None:
    identity = Identity.from_config(section(tmp_path, {METHOD: ["gateway"]}), KeyTable())

    with pytest.raises(Unauthenticated) as caught:
        identity.service(METHOD, credential)

    assert credential == "" or credential not in caught.value.message


def test_list_that_names_an_unknown_service_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gatewya"):
        Identity.from_config(section(tmp_path, {METHOD: ["gatewya"]}), KeyTable())


def test_file_that_holds_no_hash_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="SHA-256"):
        Identity.from_config(section(tmp_path, {}, digest="hunter2"), KeyTable())


def test_internal_method_without_callers_stops_the_start(tmp_path: Path) -> None:
    nobody: dict[str, list[str]] = {METHOD: []}
    for allow in ({}, nobody):
        identity = Identity.from_config(section(tmp_path, allow), KeyTable())
        with pytest.raises(ConfigError, match=METHOD):
            identity.require_allow_lists([policy(Audience.INTERNAL)])
        identity.require_allow_lists([policy(Audience.PUBLIC), policy(Audience.ADMIN)])
