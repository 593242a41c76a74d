"""Shows features from outside and prints one line for each: python -m tools.conformance."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from libs.observability.logs import configure_logs
from tools.conformance import local, verdict
from tools.conformance.engine import run as engines
from tools.conformance.engine.table import ROWS
from tools.conformance.features import GROUPS, run
from tools.conformance.options import ENGINE_GROUP, OptionError, Options, parse
from tools.conformance.verdict import Verdict
from tools.local.temporary import SuiteFailure

GATEWAYS = {"money": 3}
"""Of the kit's own suite, where a group shows what holds over all of them."""


def say(text: str) -> None:
    """Prints a line now."""
    print(text, flush=True)


def show(options: Options) -> list[Verdict]:
    """Shows what was asked for, on a suite or on engines alone.

    Raises:
        SuiteFailure: the kit's own suite did not start.
    """
    with contextlib.ExitStack() as stack:
        if options.group == ENGINE_GROUP:
            # A worker runs in this process; its words are not those of a check.
            configure_logs("conformance", "error")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="maas-engine-")))
            rows = {name: ROWS[name] for name in options.engines}
            return asyncio.run(engines.run(rows, options.only, folder, say))
        place = options.deployment
        if place is None:
            gateways = GATEWAYS.get(options.group, 1)
            place = stack.enter_context(local.own_suite(options.engine, gateways=gateways))
        return asyncio.run(run(GROUPS[options.group], place, options.only, say))


def main(arguments: Sequence[str]) -> int:
    """Shows what was asked for; returns the exit code."""
    try:
        verdicts = show(parse(arguments))
    except (OptionError, SuiteFailure) as error:
        sys.stderr.write(f"conformance: {error}\n")
        return 2
    say(verdict.summary(verdicts))
    return verdict.exit_code(verdicts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
