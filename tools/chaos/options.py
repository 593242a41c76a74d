"""Flags of `python -m tools.chaos`."""

from __future__ import annotations

import argparse
import dataclasses
import secrets
from collections.abc import Sequence

from tools.chaos import plan

GATEWAYS_MAX = 5
SECONDS_MAX = 24 * 3600.0
CLIENTS_MAX = 64
KILLS_MAX = 100_000
PAUSE_MIN_S = 0.1
PAUSE_MAX_S = 60.0
SEED_MAX = 1 << 32


class OptionError(Exception):
    """The user asked for something that cannot be; the text says what."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """A campaign.

    Attributes:
        seconds: how long strikes go on, at least.
        kills: go on until there were so many.
        seed: of strikes and of clients.
        strikes_max: processes that are struck in a round.
        pause_s: seconds of work between two rounds of strikes, on the average.
        clients: how many ask at the same time.
        gateways: how many there are; clients are spread over them.
        has_network: links are in trouble, too.
        keeps_logs: logs stay, even if nothing is wrong.
        has_points: processes also die at every fail-point, and the campaign goes on until they
            have.
    """

    seconds: float
    kills: int
    seed: int
    strikes_max: int
    pause_s: float
    clients: int
    gateways: int
    has_network: bool
    keeps_logs: bool
    has_points: bool


def parse(arguments: Sequence[str]) -> Options:
    """Reads the flags.

    Raises:
        OptionError: a value is out of its range.
    """
    parser = argparse.ArgumentParser(
        prog="make chaos", description="Kills a suite under load, then audits every token."
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to strike (60)")
    parser.add_argument("--kills", type=int, default=0, help="strike until there were so many")
    parser.add_argument("--seed", type=int, help="repeats the strikes of another campaign")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds of work between (1)")
    parser.add_argument("--strikes", type=int, default=6, help="most strikes of a round (6)")
    parser.add_argument("--clients", type=int, default=24, help="who ask at the same time (24)")
    parser.add_argument("--gateways", type=int, default=3, help="how many (3)")
    parser.add_argument("--keep-logs", action="store_true", help="even if nothing is wrong")
    parser.add_argument("--no-network", action="store_true", help="leave the network alone")
    parser.add_argument("--no-points", action="store_true", help="leave the fail-points out")
    found = parser.parse_args(arguments)
    if not 0 < found.seconds <= SECONDS_MAX:
        raise OptionError(f"--seconds must be above 0, and {SECONDS_MAX:g} at most")
    if not PAUSE_MIN_S <= found.pause <= PAUSE_MAX_S:
        raise OptionError(f"--pause must be {PAUSE_MIN_S:g} to {PAUSE_MAX_S:g}")
    if not 1 <= found.gateways <= GATEWAYS_MAX:
        raise OptionError(f"--gateways must be 1 to {GATEWAYS_MAX}")
    strikes_max = len(plan.targets(found.gateways))
    if not 1 <= found.strikes <= strikes_max:
        raise OptionError(f"--strikes must be 1 to {strikes_max}")
    if not 1 <= found.clients <= CLIENTS_MAX:
        raise OptionError(f"--clients must be 1 to {CLIENTS_MAX}")
    if not 0 <= found.kills <= KILLS_MAX:
        raise OptionError(f"--kills must be 0 to {KILLS_MAX}")
    seed = secrets.randbelow(SEED_MAX) if found.seed is None else found.seed
    if not 0 <= seed < SEED_MAX:
        raise OptionError(f"--seed must be 0 to {SEED_MAX - 1}")
    return Options(
        seconds=found.seconds,
        kills=found.kills,
        seed=seed,
        strikes_max=found.strikes,
        pause_s=found.pause,
        clients=found.clients,
        gateways=found.gateways,
        has_network=not found.no_network,
        keeps_logs=found.keep_logs,
        has_points=not found.no_points,
    )
