"""Services find each other through the network, and nobody is left out."""

from __future__ import annotations

from tools.chaos import plan
from tools.chaos.place import detours
from tools.local.options import parse


def test_every_link_but_those_of_clients_is_a_setting_of_who_calls() -> None:
    entries = {link: f"127.0.0.1:{port}" for port, link in enumerate(plan.links(2), 1)}

    settings = detours(entries)

    assert "worker-1:worker.endpoint=" + entries["gateways>worker-1"] in settings
    assert "gateway-2:peers.billing=" + entries["gateway-2>billing"] in settings
    assert len(settings) == sum(not link.startswith("clients") for link in entries)
    flags = [part for setting in settings for part in ("--set", setting)]
    # `make run` knows all of them.
    got = parse(["--engine", "sim", "--workers", "2", "--gateways", "2", *flags])
    assert len(got.settings) == len(settings)
