"""The installation in deploy/kubernetes hangs together, and is what the services take."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from libs import config
from libs.config import ServiceConfig
from services.worker.config import Config as WorkerConfig
from tools.deploy.manifests import (
    Document,
    Pod,
    at,
    configuration,
    documents,
    files_of,
    name_of,
    named,
    pods,
    render,
    renderer,
    rows,
    table,
    texts,
    words,
)
from tools.local.place import ROOT

COMMAND = renderer()
pytestmark = pytest.mark.skipif(COMMAND is None, reason="needs kubectl or kustomize")
SERVICES = {"auth", "billing", "catalog", "gateway", "scheduler"}
WORKERS = {"worker", "worker-tp", "worker-multi-node"}
END_MARGIN_S = 15
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the very place
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A pod that runs one of our processes, with its configuration as the process reads it."""

    pod: Pod
    service: str
    text: str
    config: ServiceConfig
    main: Document


@pytest.fixture(scope="module")
def found() -> list[Document]:
    assert COMMAND is not None
    return documents(render(COMMAND))


@pytest.fixture(scope="module")
def processes(found: list[Document], tmp_path_factory: pytest.TempPathFactory) -> list[Process]:
    result = []
    for pod in pods(found):
        configured = configuration(found, pod)
        if configured is None:
            continue
        service, text = configured
        file = tmp_path_factory.mktemp(pod.owner) / f"{service}.toml"
        file.write_text(text)
        kind = import_module(f"services.{service}.config").Config
        result.append(
            Process(
                pod=pod,
                service=service,
                text=text,
                # What --check-config does.
                config=config.load(kind, file),
                main=rows(pod.spec["containers"])[0],
            )
        )
    return result


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def ports_of(container: Document) -> dict[str, int]:
    return {str(port["name"]): int(str(port["containerPort"])) for port in rows(container["ports"])}


def service_ports(found: list[Document]) -> set[str]:
    """Every "service:port" that is there to be called, and PostgreSQL, which is elsewhere."""
    result = {"postgres:5432"}
    for name, service in named(found, "Service").items():
        result |= {f"{name}:{port['port']}" for port in rows(at(service, "spec", "ports"))}
    return result


def values_of(section: object) -> list[Any]:
    """All values in a configuration, however deep."""
    if isinstance(section, dict):
        return [value for part in section.values() for value in values_of(part)]
    return [section]


def test_every_process_accepts_its_configuration(processes: list[Process]) -> None:
    assert {process.pod.owner for process in processes} == SERVICES | WORKERS
    assert {process.config.identity.name for process in processes} == SERVICES | {"worker"}


def test_nothing_is_left_to_be_filled_in(processes: list[Process]) -> None:
    assert [process.pod.owner for process in processes if "${" in process.text] == []


def test_services_let_in_whom_they_let_in_elsewhere(processes: list[Process]) -> None:
    for process in processes:
        template = ROOT / "deploy" / "config" / "local" / f"{process.service}.toml"
        local = tomllib.loads(template.read_text().replace("${optional}", ""))["identity"]

        assert process.config.identity.allow == local.get("allow", {}), process.pod.owner
        assert set(process.config.identity.callers) == set(local.get("callers", {}))


def test_processes_listen_where_they_are_called_and_probed(
    found: list[Document], processes: list[Process]
) -> None:
    for process in processes:
        server = process.config.server
        ports = ports_of(process.main)
        assert ports == {"grpc": port_of(server.listen), "metrics": port_of(server.metrics_listen)}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert at(process.main, probe, "grpc", "port") == ports["grpc"], process.pod.owner
        for address in (server.listen, server.metrics_listen):
            assert address.startswith("0.0.0.0:"), "kubelets and callers come from outside the pod"
    for service in named(found, "Service").values():
        selector = words(at(service, "spec", "selector"))
        chosen = [
            process for process in processes if selector.items() <= process.pod.labels.items()
        ]
        assert not selector or len(chosen) == 1, name_of(service)
        for process in chosen if selector else []:
            assert [port["port"] for port in rows(at(service, "spec", "ports"))] == [
                port_of(process.config.server.listen)
            ]


def test_whom_a_process_calls_is_there(found: list[Document], processes: list[Process]) -> None:
    there = service_ports(found)
    for process in processes:
        values = process.config.model_dump(include={"auth", "peers"})
        called = [str(value) for value in values_of(values) if ":" in str(value)]
        dsn = process.config.model_dump().get("postgres", {}).get("dsn")
        called += [dsn.partition("@")[2].partition("/")[0]] if dsn else []

        assert called, process.pod.owner
        assert set(called) <= there, process.pod.owner


def test_a_process_is_given_the_files_it_reads_and_no_secret_else(
    found: list[Document], processes: list[Process]
) -> None:
    for process in processes:
        read = {
            str(value)
            for value in values_of(process.config.model_dump())
            if str(value).startswith("/run/secrets/maas/")
        }
        given = set(files_of(found, process.pod, process.main))

        assert read <= given, process.pod.owner
        unread = {path for path in given - read if path.startswith("/run/secrets/maas/")}
        assert {path for path in unread if not path.endswith(".sha256")} == set()


def test_a_key_opens_only_the_pods_that_have_none(found: list[Document]) -> None:
    given = {
        pod.role: {
            Path(path).name
            for path in files_of(found, pod, rows(pod.spec["containers"])[0])
            if path.startswith("/run/secrets/maas-ssh/")
        }
        for pod in pods(found)
        if pod.kind == "LeaderWorkerSet"
    }

    assert given == {"leader": {"user", "host.pub"}, "worker": {"host", "user.pub"}}


def test_a_pod_has_the_time_to_drain(processes: list[Process]) -> None:
    for process in processes:
        given_s = process.pod.spec["terminationGracePeriodSeconds"]
        before_s = at(process.main, "lifecycle", "preStop", "sleep", "seconds") or 0
        assert isinstance(given_s, int)
        assert isinstance(before_s, int)

        needed_s = before_s + process.config.server.drain_grace + END_MARGIN_S
        assert given_s >= needed_s, process.pod.owner


def test_gateways_reach_the_very_worker_they_were_sent_to(processes: list[Process]) -> None:
    workers = [process for process in processes if process.service == "worker"]
    for process in workers:
        pod, dump = process.pod, process.config.model_dump()["worker"]
        port = port_of(process.config.server.listen)

        assert pod.domain
        assert dump["name"] == pod.first
        assert dump["endpoint"] == f"{pod.first}.{pod.domain}:{port}"


def test_a_gateway_has_a_name_and_a_journal_of_its_own(
    found: list[Document], processes: list[Process]
) -> None:
    (gateway,) = (process for process in processes if process.service == "gateway")
    section = gateway.config.model_dump()["gateway"]
    claims = at(named(found, "StatefulSet")["gateway"], "spec", "volumeClaimTemplates")
    mounts = {
        str(mount["name"]): str(mount["mountPath"]) for mount in rows(gateway.main["volumeMounts"])
    }

    assert section["instance"] == gateway.pod.first
    assert Path(mounts[name_of(rows(claims)[0])]) in section["journal_dir"].parents


def test_an_engine_gets_its_gpus_and_the_time_to_load(
    found: list[Document], processes: list[Process]
) -> None:
    sizes = {
        name: at(document, "spec", "leaderWorkerTemplate", "size")
        for name, document in named(found, "LeaderWorkerSet").items()
    }
    for process in processes:
        if not isinstance(process.config, WorkerConfig):
            continue
        trtllm = process.config.worker.trtllm
        size = sizes.get(process.pod.owner)
        nodes = size if isinstance(size, int) else 1
        each = int(str(at(process.main, "resources", "limits", "nvidia.com/gpu")))
        probe = table(process.main["startupProbe"])
        patience_s = int(str(probe["periodSeconds"])) * int(str(probe["failureThreshold"]))

        assert trtllm.multi_node.nodes == nodes
        assert trtllm.parallelism.gpus == nodes * each
        assert trtllm.parallelism.gpus_per_node in ({None, each} if nodes == 1 else {each})
        # The leader of several waits for the others first.
        assert patience_s > trtllm.load_within + (600 if nodes > 1 else 0)


def test_shared_memory_is_a_volume_and_no_pod_is_let_out_of_its_box(
    found: list[Document],
) -> None:
    for pod in pods(found):
        assert not {"hostIPC", "hostPID", "hostNetwork"} & set(pod.spec), pod.owner
        assert at(pod.spec, "securityContext", "runAsNonRoot") is True
        assert pod.spec["automountServiceAccountToken"] is False
        for container in pod.containers:
            assert container["securityContext"] == RESTRICTED, pod.owner
        if pod.labels.get("app.kubernetes.io/component") == "worker":
            volumes = {str(volume["name"]): volume for volume in rows(pod.spec["volumes"])}
            assert at(volumes["shm"], "emptyDir", "medium") == "Memory"
            assert {"name": "shm", "mountPath": SHARED_MEMORY} in rows(
                rows(pod.spec["containers"])[0]["volumeMounts"]
            )


def callers_of(found: list[Document], port: str, labels: dict[str, str]) -> set[str]:
    """Who may open a connection to a port of pods with these labels."""
    result = set()
    for policy in named(found, "NetworkPolicy").values():
        selector = words(at(policy, "spec", "podSelector", "matchLabels"))
        if not selector.items() <= labels.items():
            continue
        for rule in rows(at(policy, "spec", "ingress")):
            ports = {str(row["port"]) for row in rows(rule.get("ports"))}
            for peer in rows(rule.get("from")) if not ports or port in ports else []:
                chosen = words(at(peer, "podSelector", "matchLabels"))
                result.add(
                    chosen.get("app.kubernetes.io/name")
                    or chosen.get("app.kubernetes.io/component")
                    or ",".join(chosen.values())
                )
    return result


def test_only_gateways_and_the_scheduler_reach_a_worker(
    found: list[Document], processes: list[Process]
) -> None:
    for process in processes:
        if process.service == "worker":
            callers = callers_of(found, "grpc", dict(process.pod.labels))

            # Pods of one group also talk among themselves.
            assert callers - {"worker-multi-node"} == {"gateway", "scheduler"}


def test_whoever_is_let_in_by_its_token_is_let_in_by_the_network(
    found: list[Document], processes: list[Process]
) -> None:
    for process in processes:
        callers = set(process.config.identity.callers)

        assert callers <= callers_of(found, "grpc", dict(process.pod.labels)), process.pod.owner


def test_every_image_is_one_that_the_dockerfile_makes(found: list[Document]) -> None:
    dockerfile = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    targets = {line.split(" AS ")[1] for line in dockerfile.splitlines() if " AS " in line}
    images = {
        str(container["image"]).rpartition("/")[2].partition(":")[0]
        for pod in pods(found)
        for container in pod.containers
    }

    assert images == {f"maas-{target}" for target in ("services", "worker", "worker-multi-node")}
    assert {image.removeprefix("maas-") for image in images} <= targets


def test_a_command_leaves_the_entry_point_of_its_image_alone(processes: list[Process]) -> None:
    for process in processes:
        # tini, and NVIDIA's entry point, are the image's: `command` would replace them.
        assert "command" not in process.main
        assert texts(process.main["args"])
