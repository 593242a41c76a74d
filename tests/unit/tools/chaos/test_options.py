"""Flags of a campaign."""

from __future__ import annotations

import pytest

from tools.chaos.options import OptionError, parse


def test_seed_is_kept_or_drawn() -> None:
    assert parse(["--seed", "7"]).seed == 7
    assert parse([]).seed != parse([]).seed


def test_points_are_part_of_it_unless_told() -> None:
    assert parse([]).has_points
    assert not parse(["--no-points"]).has_points


@pytest.mark.parametrize(
    "flags",
    [
        ["--seconds", "0"],
        ["--seconds", "nan"],
        ["--kills", "-1"],
        ["--pause", "0"],
        ["--strikes", "0"],
        ["--strikes", "12"],
        ["--gateways", "0"],
        ["--gateways", "6"],
        ["--clients", "0"],
        ["--clients", "65"],
        ["--seed", "-1"],
    ],
)
def test_what_cannot_be_is_refused(flags: list[str]) -> None:
    with pytest.raises(OptionError, match=flags[0]):
        parse(flags)
