"""A campaign on a suite of its own: python -m tools.chaos."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from tools.chaos import campaign, table
from tools.chaos.options import OptionError, parse
from tools.chaos.place import SuiteFailure, own_suite


def say(text: str) -> None:
    """Prints a line now."""
    print(text, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Runs the campaign; returns the exit code."""
    try:
        options = parse(arguments)
        say(f"seed {options.seed}")
        with own_suite() as place:
            outcome = asyncio.run(campaign.run(place, options, say))
            if outcome.faults:
                say(f"logs: {place.keep_logs()}")
    except (OptionError, SuiteFailure) as error:
        sys.stderr.write(f"chaos: {error}\n")
        return 2
    say("\n".join(table.lines(outcome)))
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
