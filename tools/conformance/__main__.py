"""Shows features from outside and prints one line for each: python -m tools.conformance."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Sequence

from tools.conformance import local, verdict
from tools.conformance.features import GROUPS, run
from tools.conformance.options import OptionError, parse


def say(text: str) -> None:
    """Prints a line now."""
    print(text, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Shows what was asked for; returns the exit code."""
    try:
        options = parse(arguments)
        with contextlib.ExitStack() as stack:
            place = options.deployment
            if place is None:
                place = stack.enter_context(local.own_suite(options.engine))
            verdicts = asyncio.run(run(GROUPS[options.group], place, options.only, say))
    except (OptionError, local.SuiteFailure) as error:
        sys.stderr.write(f"conformance: {error}\n")
        return 2
    say(verdict.summary(verdicts))
    return verdict.exit_code(verdicts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
