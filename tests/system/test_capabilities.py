"""docs/capabilities.md is what the engines say of themselves."""

from __future__ import annotations

import subprocess
import sys


def test_table_of_capabilities_is_what_the_engines_say() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.capabilities", "--check"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )

    assert done.returncode == 0, done.stdout + done.stderr
