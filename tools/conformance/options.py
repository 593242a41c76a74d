"""What a run of the kit was asked for."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tools.conformance.deployment import AdapterFile, Deployment, command_of, shell_action
from tools.conformance.engine.contract import CHECKS
from tools.conformance.engine.run import known_names
from tools.conformance.engine.table import ROWS
from tools.conformance.features import GROUPS
from tools.local.options import ENGINES

ENGINE_GROUP = "engine"
"""The group that needs no suite: its checks are made on engines alone."""


class OptionError(Exception):
    """The flags do not go together, or a file cannot be read; the text says what."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to show, and on what.

    Attributes:
        group: of features.
        only: their ids; empty for all of the group.
        engine: of the kit's own suite.
        engines: whose contract is looked at; empty in other groups.
        deployment: a deployment that runs already; None for a suite of the kit's own.
    """

    group: str
    only: tuple[str, ...]
    engine: str
    engines: tuple[str, ...] = ()
    deployment: Deployment | None


def parser() -> argparse.ArgumentParser:
    """Describes the flags."""
    found = argparse.ArgumentParser(
        prog="python -m tools.conformance",
        description="Shows features from outside; without --endpoint on a suite of its own.",
    )
    add = found.add_argument
    add("--group", choices=sorted((*GROUPS, ENGINE_GROUP)), required=True)
    add("--only", metavar="ID,...", default="", help="only these features")
    add(
        "--engine",
        choices=sorted({*ENGINES, *ROWS}),
        help="of the kit's own suite (sim); in group engine, whose contract (all)",
    )
    add("--endpoint", metavar="HOST:PORT", help="of a gateway that runs already")
    add("--model", help="offering to call")
    add("--api-key-file", type=Path, help="key of a tenant with credit")
    add("--admin-key-file", type=Path, help="key of an administrator")
    add("--admin-endpoint", metavar="HOST:PORT", help="auth: to make and revoke keys")
    add("--billing", metavar="HOST:PORT", help="balances and usage records")
    add("--scheduler", metavar="HOST:PORT", help="workers and their load")
    add("--catalog", metavar="HOST:PORT", help="LoRA adapters")
    add("--adapter", metavar="ID", help="a LoRA adapter of the model that exists already")
    add("--kill-worker", metavar="COMMAND", help="kills {worker} at once; run by the shell")
    add("--drain-worker", metavar="COMMAND", help="sends SIGTERM to {worker}; run by the shell")
    add("--kill-gateway", metavar="COMMAND", help="kills the gateway at once; run by the shell")
    add("--more-gateways", metavar="HOST:PORT,...", help="further gateways of the deployment")
    add("--stall-limit", type=float, default=30.0, metavar="SECONDS", help="of the gateway (30)")
    add("--replay-window", type=float, default=60.0, metavar="SECONDS", help="of the gateway (60)")
    add("--ca", type=Path, help="PEM of the certificates to trust; without it plaintext")
    return found


def parse(arguments: Sequence[str]) -> Options:
    """Reads the flags.

    Raises:
        OptionError: an id is unknown, a flag is missing beside --endpoint, a file is unreadable.
    """
    found = parser().parse_args(arguments)
    only = tuple(part for part in found.only.split(",") if part)
    if found.group == ENGINE_GROUP:
        return _of_engines(found, only)
    unknown = sorted(set(only) - set(GROUPS[found.group]))
    if unknown:
        known = ", ".join(GROUPS[found.group])
        raise OptionError(f"--only: no feature {', '.join(unknown)}; there are {known}")
    return Options(
        group=found.group,
        only=only,
        engine=found.engine or "sim",
        deployment=_deployment(found),
    )


def _of_engines(found: argparse.Namespace, only: tuple[str, ...]) -> Options:
    if found.endpoint is not None:
        raise OptionError("group engine looks at engines alone: drop --endpoint")
    _deployment(found)
    unknown = sorted(set(only) - known_names())
    if unknown:
        groups = ", ".join(dict.fromkeys(check.group for check in CHECKS))
        raise OptionError(
            f"--only: no check {', '.join(unknown)}; there are the groups {groups}, and every name "
            "that a run prints"
        )
    return Options(
        group=found.group,
        only=only,
        engine=found.engine or "sim",
        engines=(found.engine,) if found.engine else tuple(ROWS),
        deployment=None,
    )


def _deployment(found: argparse.Namespace) -> Deployment | None:
    if found.endpoint is None:
        outside = (
            "model",
            "api_key_file",
            "admin_key_file",
            "admin_endpoint",
            "billing",
            "scheduler",
            "catalog",
            "adapter",
            "kill_worker",
            "drain_worker",
            "kill_gateway",
            "more_gateways",
            "ca",
        )
        given = [name for name in outside if getattr(found, name) is not None]
        if given:
            flag = given[0].replace("_", "-")
            raise OptionError(f"--{flag} is for a deployment that runs already: add --endpoint")
        return None
    if found.engine is not None:
        raise OptionError("--engine is for the kit's own suite: drop it beside --endpoint")
    if found.model is None or found.api_key_file is None:
        raise OptionError("--endpoint needs --model and --api-key-file")
    if found.stall_limit <= 0 or found.replay_window <= 0:
        raise OptionError("--stall-limit and --replay-window must be above 0")
    for name in ("endpoint", "admin_endpoint", "billing", "scheduler", "catalog"):
        address = getattr(found, name)
        if address is not None and not address.rpartition(":")[2].isdecimal():
            raise OptionError(f"--{name.replace('_', '-')} must be HOST:PORT")
    return Deployment(
        endpoint=found.endpoint,
        api_key=_secret(found.api_key_file),
        model=found.model,
        admin_key=None if found.admin_key_file is None else _secret(found.admin_key_file),
        auth=found.admin_endpoint,
        billing=found.billing,
        scheduler=found.scheduler,
        catalog=found.catalog,
        adapter=None if found.adapter is None else AdapterFile(adapter_id=found.adapter),
        certificates=None if found.ca is None else _read(found.ca),
        stall_limit_s=found.stall_limit,
        replay_window_s=found.replay_window,
        kill=None if found.kill_worker is None else shell_action(found.kill_worker),
        drain=None if found.drain_worker is None else shell_action(found.drain_worker),
        kill_gateway=None if found.kill_gateway is None else command_of(found.kill_gateway),
        more_endpoints=[part for part in (found.more_gateways or "").split(",") if part],
    )


def _secret(path: Path) -> str:
    text = _read(path).decode("ascii", "replace").strip()
    if not text:
        raise OptionError(f"{path} is empty")
    return text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OptionError(f"{path}: {error.strerror}") from error
