"""Cases on a small disk: run by a process of its own that sees one where temporary files are.

The disk is in memory and belongs to that process and its children alone; it is gone with them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.conformance.verdict import Kind, Verdict
from tools.local.place import ROOT

SIZE = "256m"
RUN_S = 300.0
NEEDS = "needs root, and a system that lets it mount a disk of its own"
_MOUNT = f'mount -t tmpfs -o size={SIZE},mode=755 tmpfs "$0" && exec "$@"'


def show(names: Sequence[str]) -> list[Verdict]:
    """Has a process of its own show cases; their verdicts.

    Args:
        names: of cases that want a small disk.
    """
    if not names:
        return []
    unshare = shutil.which("unshare")
    if unshare is None or os.geteuid() != 0:
        return [Verdict(Kind.SKIP, name, NEEDS) for name in names]
    with tempfile.TemporaryDirectory(prefix="maas-small-") as text:
        Path(text).chmod(0o711)
        disk, other = Path(text) / "disk", Path(text) / "other"
        disk.mkdir(mode=0o711)
        other.mkdir(mode=0o700)
        own = [sys.executable, "-m", "tools.chaos.cases", "--small-disk", str(other)]
        done = subprocess.run(
            [unshare, "--mount", "sh", "-c", _MOUNT, str(disk), *own, "--only", ",".join(names)],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(disk)},  # noqa: TID251 - for a child
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            timeout=RUN_S,
        )
    found = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    known = {kind.value for kind in Kind}
    verdicts = [Verdict(Kind(part[0]), part[1], part[2]) for part in found if part[0] in known]
    return verdicts or [Verdict(Kind.SKIP, name, NEEDS) for name in names]
