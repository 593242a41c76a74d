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
_MOUNTED = "mounted"
_MOUNT = f'mount -t tmpfs -o size={SIZE},mode=755 tmpfs "$0" && echo {_MOUNTED} && exec "$@"'


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
    return verdicts_of(names, done.stdout, done.returncode)


def verdicts_of(names: Sequence[str], said: str, code: int) -> list[Verdict]:
    """Reads what that process has said.

    Args:
        names: of the cases that it was to show.
        said: all of it.
        code: that it ended with.

    Returns:
        one for each case: who has a disk and says nothing of a case has failed.
    """
    lines = said.splitlines()
    if _MOUNTED not in lines:
        return [Verdict(Kind.SKIP, name, NEEDS) for name in names]
    verdicts = {}
    for kind, name, *text in (line.split(maxsplit=2) for line in lines if len(line.split()) > 1):
        if name in names and kind in {each.value for each in Kind}:
            verdicts[name] = Verdict(Kind(kind), name, " ".join(text))
    silent = f"its process ended with {code} and said nothing of it"
    return [verdicts.get(name) or Verdict(Kind.FAIL, name, silent) for name in names]
