"""Writes docs/capabilities.md: each field of a request, and which engine serves it.

    python -m tools.capabilities            writes it
    python -m tools.capabilities --check    says whether it is what the engines say

A suite is started with each of the embedded engines, as `make run` does, and asked.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator, Mapping

from google.protobuf.descriptor import Descriptor
from maas.common.v1 import capabilities_pb2, options_pb2
from maas.inference.v1 import embedding_service_pb2, generation_pb2

from libs.capabilities import FLAGS, NUMBERS, Need
from tools.conformance.deployment import Deployment
from tools.conformance.local import own_suite
from tools.conformance.trial import Trial
from tools.local.place import ROOT
from tools.local.temporary import SuiteFailure

PAGE = ROOT / "docs" / "capabilities.md"
ENGINES = ("llamacpp", "sim")
_HEAD = """\
# Capabilities

Made by `python -m tools.capabilities` from the contract (`needs` of each field) and from what the
engines say; do not edit. Ask a deployment itself with `GenerationService.GetCapabilities`: the
model, its chat template and the operator have a say too.

A request that uses a field whose flag is false is refused with INVALID_ARGUMENT /
FEATURE_UNSUPPORTED, naming the field, before money moves; a number is the largest value.
"""
_ROOTS = (
    ("spec", generation_pb2.GenerationSpec.DESCRIPTOR),
    ("EmbedRequest", embedding_service_pb2.EmbedRequest.DESCRIPTOR),
)


def page(found: Mapping[str, capabilities_pb2.Capabilities]) -> str:
    """Makes the page.

    Args:
        found: what each engine can do, by its name.
    """
    fields = [need for prefix, root in _ROOTS for need in _fields(root, f"{prefix}.", "")]
    # An embedding needs them, whatever the request says.
    fields = [
        Need(need.path, need.flag or _EMBED_FLAG) if need.path.startswith("EmbedRequest") else need
        for need in fields
    ]
    needed = {field.flag for field in fields}
    lines = [_HEAD, "## Fields", "", *_table(["field", "flag", *found])]
    lines += [
        _row(
            [f"`{field.path}`", f"`{field.flag}`" if field.flag else "", *_cells(field.flag, found)]
        )
        for field in fields
    ]
    lines += ["", "## Flags that no field depends on", "", *_table(["flag", *found])]
    lines += [_row([f"`{flag}`", *_cells(flag, found)]) for flag in FLAGS if flag not in needed]
    return "\n".join(lines) + "\n"


_EMBED_FLAG = "embedding_dimensions"


def _fields(message: Descriptor, prefix: str, flag: str) -> Iterator[Need]:
    """Lists what a request may hold, down to plain values, each with the nearest flag above it."""
    for field in message.fields:
        own = field.GetOptions().Extensions[options_pb2.rules].needs or flag
        path = f"{prefix}{field.name}"
        inner = field.message_type
        is_ours = inner is not None and inner.full_name.startswith("maas.")
        if inner is None or not is_ours or inner.GetOptions().map_entry or not inner.fields:
            yield Need(path, own)
        else:
            yield from _fields(inner, f"{path}[]." if field.is_repeated else f"{path}.", own)


def _table(header: list[str]) -> list[str]:
    return [_row(header), _row(["---"] * len(header))]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(flag: str, found: Mapping[str, capabilities_pb2.Capabilities]) -> list[str]:
    if not flag:
        return ["yes"] * len(found)
    values = [getattr(capabilities, flag) for capabilities in found.values()]
    return [str(value) if flag in NUMBERS else ("yes" if value else "no") for value in values]


async def _ask(deployment: Deployment) -> capabilities_pb2.Capabilities:
    async with Trial(deployment) as trial, trial.tenant() as tenant:
        return (await tenant.capabilities()).capabilities


def ask_all() -> dict[str, capabilities_pb2.Capabilities]:
    """Starts each engine and asks what it can do.

    Raises:
        SuiteFailure: one did not start.
    """
    found = {}
    for engine in ENGINES:
        with own_suite(engine) as deployment:
            found[engine] = asyncio.run(_ask(deployment))
    return found


def main() -> int:
    """Writes or checks the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    asked = parser.parse_args()
    try:
        made = page(ask_all())
    except SuiteFailure as failure:
        sys.stderr.write(f"{failure}\n")
        return 1
    if not asked.check:
        PAGE.write_text(made, encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == made:
        return 0
    sys.stderr.write(f"{PAGE.name} is not what the engines say: run python -m tools.capabilities\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
