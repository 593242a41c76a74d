"""Becomes psql, as the superuser of the local database: `make psql`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from libs.postgres import cluster, wheel
from tools.local.options import state_argument
from tools.local.place import DATABASE, State


def main() -> NoReturn:
    """Runs psql in place of this process; returns only when it cannot."""
    parser = argparse.ArgumentParser(prog="make psql", description=__doc__)
    state_argument(parser)
    state = State(parser.parse_args().state.resolve())
    found = cluster.place(state.root) if state.root.exists() else None
    if found is None or not found.is_created:
        sys.exit("make psql: there is no database yet: make run")
    for name, value in found.client_environment().items():
        os.putenv(name, value)
    program = str(wheel.program("psql"))
    os.execv(program, [program, DATABASE])  # noqa: S606 - no shell wanted


if __name__ == "__main__":
    main()
