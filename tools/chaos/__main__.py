"""A campaign on a suite of its own: python -m tools.chaos. With --cases: the systematic ones."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from tools.chaos import campaign, table
from tools.chaos.cases import __main__ as cases
from tools.chaos.options import OptionError, parse
from tools.chaos.place import SuiteFailure, own_suite

CASES = "--cases"


def say(text: str) -> None:
    """Prints a line now."""
    print(text, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Runs the campaign; returns the exit code."""
    if CASES in arguments:
        return cases.main([argument for argument in arguments if argument != CASES])
    try:
        options = parse(arguments)
        say(f"seed {options.seed}")
        with own_suite(options.gateways, has_network=options.has_network) as place:
            outcome = asyncio.run(campaign.run(place, options, say))
            if outcome.faults or options.keeps_logs:
                say(f"logs: {place.keep_logs()}")
    except (OptionError, SuiteFailure) as error:
        sys.stderr.write(f"chaos: {error}\n")
        return 2
    say("\n".join(table.lines(outcome)))
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
