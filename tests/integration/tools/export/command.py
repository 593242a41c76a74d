"""The export command as a process."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass

from tests.conftest import ROOT
from tests.integration.services.billing.world import Billing

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Run:
    """A run of the command that has ended."""

    code: int
    out: bytes
    said: str


async def export(billing: Billing, *flags: str, key: str | None = None) -> Run:
    """Runs the command as the tenant."""
    own = billing.tenant.peer._metadata[0][1].removeprefix("Bearer ")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tools.export", "--endpoint", billing.endpoint, *flags),
        cwd=ROOT,
        env={"MAAS_KEY": own if key is None else key},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, said = await process.communicate()
    return Run(process.returncode or 0, out, said.decode())
