"""deploy/config/local: every file is rendered, loaded by its service, and complete."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import tomllib
from pathlib import Path

import pytest
from google.protobuf.descriptor import ServiceDescriptor
from maas.auth.v1 import key_table_service_pb2
from maas.billing.v1 import (
    credit_slice_service_pb2,
    limit_service_pb2,
    price_service_pb2,
    quota_service_pb2,
)
from maas.catalog.v1 import adapter_service_pb2, model_service_pb2, offering_service_pb2
from maas.common.v1 import options_pb2
from maas.engine.v1 import engine_service_pb2
from maas.scheduler.v1 import (
    placement_service_pb2,
    worker_registry_service_pb2,
    worker_service_pb2,
)

from libs import config
from tools.local import credential, options, render
from tools.local.model import SIMULATED
from tools.local.place import SERVICES, State

SERVED = {
    "auth": [key_table_service_pb2],
    "catalog": [adapter_service_pb2, model_service_pb2, offering_service_pb2],
    "billing": [
        credit_slice_service_pb2,
        limit_service_pb2,
        price_service_pb2,
        quota_service_pb2,
    ],
    "scheduler": [placement_service_pb2, worker_registry_service_pb2, worker_service_pb2],
    "worker-1": [engine_service_pb2],
    "gateway": [],
}


def config_class(service: str) -> type[config.ServiceConfig]:
    """The whole configuration of a service."""
    module = importlib.import_module(f"services.{service}.config")
    (found,) = (
        item
        for _, item in inspect.getmembers(module, inspect.isclass)
        if issubclass(item, config.ServiceConfig) and item.__module__ == module.__name__
    )
    return found


@pytest.fixture
def asked(tmp_path: Path) -> options.Options:
    # A path that would end a TOML string, were it not quoted.
    root = tmp_path / 'a "b" \\c'
    state = State(root)
    state.prepare()
    credential.create(state)
    found = options.parse(["--engine", "sim", "--workers", "2", "--gateways", "2"])
    return dataclasses.replace(found, state=state)


def test_every_file_is_what_its_service_reads(asked: options.Options) -> None:
    files = render.render(asked, SIMULATED, Path("/tmp/with space"))  # noqa: S108 - not used

    processes = {*SERVICES, "worker-1", "worker-2", "gateway-2"} - {"worker"}
    assert sorted(files) == sorted(processes)
    for name, path in files.items():
        loaded = config.load(config_class(name.partition("-")[0]), path)
        assert config.read_secret(loaded.identity.token_file).startswith("ms_")
        for caller in loaded.identity.callers.values():
            assert len(bytes.fromhex(config.read_secret(caller))) == 32


def test_model_file_and_capacity_reach_the_worker(asked: options.Options, tmp_path: Path) -> None:
    weights = tmp_path / "weights.gguf"
    weights.touch()
    asked = dataclasses.replace(asked, engine="llamacpp", model=weights, capacity=3)
    model = dataclasses.replace(SIMULATED, model_id="weights", file=weights)

    files = render.render(asked, model, tmp_path)

    worker = tomllib.loads(files["worker-2"].read_text())["worker"]
    assert (worker["name"], worker["capacity"]) == ("w2", 3)
    assert worker["model_path"] == str(weights)
    assert worker["model_version"] == "models/weights/versions/1"
    config.load(config_class("worker"), files["worker-2"])


def test_a_model_directory_reaches_a_worker_without_adapters(
    asked: options.Options, tmp_path: Path
) -> None:
    asked = dataclasses.replace(
        asked,
        engine="trtllm",
        model=tmp_path,
        settings={"worker.trtllm.batching.chunked_prefill": "false"},
    )
    model = dataclasses.replace(SIMULATED, model_id="hf", file=tmp_path)

    files = render.render(asked, model, tmp_path)

    worker = tomllib.loads(files["worker-1"].read_text())["worker"]
    assert (worker["engine"], worker["model_path"]) == ("trtllm", str(tmp_path))
    assert "adapters_dir" not in worker
    assert worker["trtllm"]["batching"] == {"chunked_prefill": False}


def test_settings_reach_their_process_and_replace_what_is_there(asked: options.Options) -> None:
    settings = {
        "gateway.slice_idle": '"5s"',
        "gateway.instance": '"g7"',
        "worker.sim.decode_base": '"20ms"',
        "worker.sim.decode_per_lane": '"0ms"',
        "worker.max_waiting": "4096",
    }
    asked = dataclasses.replace(asked, settings=settings)

    files = render.render(asked, SIMULATED, Path("/tmp/s"))  # noqa: S108 - not used

    gateway = tomllib.loads(files["gateway"].read_text())["gateway"]
    assert (gateway["slice_idle"], gateway["instance"]) == ("5s", "g7")
    for name in ("worker-1", "worker-2"):
        worker = tomllib.loads(files[name].read_text())["worker"]
        assert worker["max_waiting"] == 4096
        assert worker["sim"] == {"decode_base": "20ms", "decode_per_lane": "0ms"}
        config.load(config_class("worker"), files[name])


def test_setting_of_one_process_leaves_the_others_alone(asked: options.Options) -> None:
    settings = {"gateway-2:peers.billing": '"127.0.0.1:7"', "billing.lease_duration": '"8s"'}
    asked = dataclasses.replace(asked, settings=settings)

    files = render.render(asked, SIMULATED, Path("/tmp/s"))  # noqa: S108 - not used

    first, second = (tomllib.loads(files[name].read_text()) for name in ("gateway", "gateway-2"))
    assert second["peers"] == {**first["peers"], "billing": "127.0.0.1:7"}
    assert tomllib.loads(files["billing"].read_text())["billing"]["lease_duration"] == "8s"


def test_gateways_have_nothing_of_their_own_in_common(asked: options.Options) -> None:
    files = render.render(asked, SIMULATED, Path("/tmp/s"))  # noqa: S108 - not used

    first, second = (tomllib.loads(files[name].read_text()) for name in ("gateway", "gateway-2"))
    for section, key in (
        ("server", "listen"),
        ("server", "metrics_listen"),
        ("gateway", "instance"),
        ("gateway", "journal_dir"),
    ):
        assert first[section][key] != second[section][key]


def internal_methods(service: ServiceDescriptor) -> list[str]:
    return [
        f"{service.full_name}/{method.name}"
        for method in service.methods
        if method.GetOptions().Extensions[options_pb2.method_policy].audience
        == options_pb2.AUDIENCE_INTERNAL
    ]


def test_every_internal_method_has_callers_and_nothing_else_has(asked: options.Options) -> None:
    files = render.render(asked, SIMULATED, Path("/tmp/s"))  # noqa: S108 - not used

    for name, modules in SERVED.items():
        services = [item for m in modules for item in m.DESCRIPTOR.services_by_name.values()]
        wanted = {method for service in services for method in internal_methods(service)}
        allow = tomllib.loads(files[name].read_text())["identity"].get("allow", {})
        assert set(allow) == wanted, name
        assert all(allow.values())
