"""Logs: what happens to a process whose log cannot be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import logging
import structlog
from libs.observability.logs import configure_logs

configure_logs("tried", "info")
for number in range(200):
    structlog.get_logger("tried").info("event", number=number, text=100 * "x")
    logging.getLogger("tried").warning("event of a library")
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_fails_nobody_who_logs() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", f"{PROGRAM}\nprint('done', file=__import__('sys').stderr)"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=30,
        )

    assert done.stderr.startswith("done\n")
