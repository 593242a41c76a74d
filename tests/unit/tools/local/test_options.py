"""tools/local/options.py: what the user may ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.local import options
from tools.local.place import PORTS_SPAN, Ports


@pytest.fixture(autouse=True)
def _own_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tmp_path / "own.gguf"
    model.touch()
    monkeypatch.setattr(options, "OWN_MODEL", model)
    monkeypatch.delenv("MAAS_PORT_BASE", raising=False)


def test_default_is_our_own_model(tmp_path: Path) -> None:
    got = options.parse([])

    assert (got.engine, got.model, got.workers) == ("llamacpp", tmp_path / "own.gguf", 1)
    assert (got.ports, got.is_detached) == (Ports(50050), False)


def test_ports_follow_from_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAAS_PORT_BASE", "20000")

    ports = options.parse(["--engine", "sim"]).ports

    names = ("gateway", "catalog", "auth", "billing", "scheduler", "worker-1", "worker-2")
    assert [ports.of_process(name) for name in names] == list(range(20000, 20007))


def test_no_two_processes_of_the_largest_suite_share_a_port() -> None:
    got = options.parse(["--engine", "sim", "--workers", "16", "--gateways", "8"])
    names = ["catalog", "auth", "billing", "scheduler", *got.worker_names, *got.gateway_names]

    ports = {got.ports.of_process(name) for name in names}

    assert len(ports) == len(names)
    assert max(ports) < got.ports.base + PORTS_SPAN


@pytest.mark.parametrize("text", ["http", "-1", "80", "65000", "2e4"])
def test_bad_port_base_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MAAS_PORT_BASE", text)

    with pytest.raises(options.OptionError, match="MAAS_PORT_BASE"):
        options.parse([])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "/nowhere/x.gguf"], "there is no such model file"),
        (["--engine", "sim", "--model", "x.gguf"], "simulated engine"),
        (["--workers", "0"], "--workers"),
        (["--workers", "17"], "--workers"),
        (["--gateways", "0"], "--gateways"),
        (["--gateways", "9"], "--gateways"),
        (["--capacity", "0"], "--capacity"),
        (["--flat-out"], "simulated engine"),
        (["--step", "20ms"], "simulated engine"),
        (["--engine", "sim", "--step", "20"], "--step"),
        (["--engine", "sim", "--step", "20ms", "--flat-out"], "drop one"),
        (["--set", "gateway.slice_idle"], "SECTION.KEY=VALUE"),
        (["--set", "peers.billing=1"], "SECTION.KEY=VALUE"),
        (["--set", "gateway-2:peers.billing=1"], "no process gateway-2"),
        (["--env", "gateway-2:A=1"], "no process gateway-2"),
        (["--env", "A=1"], "PROCESS:NAME=VALUE"),
        (["--engine", "trtllm"], "needs MODEL="),
        (["--engine", "trtllm", "--model", "/nowhere"], "no config.json"),
    ],
)
def test_what_cannot_be_is_refused(flags: list[str], words: str) -> None:
    with pytest.raises(options.OptionError, match=words):
        options.parse(flags)


def test_a_model_directory_has_time_to_load(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()

    got = options.parse(["--engine", "trtllm", "--model", str(tmp_path)])

    assert (got.engine, got.model) == ("trtllm", tmp_path)
    assert got.start_timeout_s > options.parse(["--engine", "sim"]).start_timeout_s


def test_truth_is_no_text() -> None:
    got = options.parse(["--set", "worker.trtllm.kv_cache.reuse=false", "--set", "worker.name=w"])

    assert got.settings == {"worker.trtllm.kv_cache.reuse": "false", "worker.name": '"w"'}


def test_variables_are_of_one_process() -> None:
    got = options.parse(["--env", "gateway:A=1", "--env", "gateway:B=", "--env", "worker-1:A=x=y"])

    assert got.environments == {"gateway": {"A": "1", "B": ""}, "worker-1": {"A": "x=y"}}


def test_missing_own_model_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "OWN_MODEL", Path("/nowhere/own.gguf"))

    with pytest.raises(options.OptionError, match="ENGINE=sim"):
        options.parse([])


def test_pace_and_settings_are_toml_by_section_and_key() -> None:
    flags = ["--engine", "sim", "--step", "20ms"]
    flags += ["--set", "gateway.slice_idle=5s", "--set", "worker.max_waiting=4096"]

    got = options.parse(flags).settings

    assert (got["gateway.slice_idle"], got["worker.max_waiting"]) == ('"5s"', "4096")
    assert (got["worker.sim.decode_base"], got["worker.sim.decode_per_lane"]) == (
        '"20ms"',
        '"0ms"',
    )
