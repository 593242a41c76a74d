"""Where things are: the repository, the state directory of a local suite, its ports.

Names paths and numbers; reads and writes nothing but the directories of `State.prepare`.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TEMPLATES = ROOT / "deploy" / "config" / "local"
ROLES = ROOT / "deploy" / "postgres" / "roles.sql"
OWN_MODEL = ROOT / "services" / "worker" / "models" / "maas-tiny-story.gguf"
OWN_TEMPLATE = ROOT / "services" / "worker" / "templates" / "chatml_tools.jinja"
DATABASE = "maas"
HOST = "127.0.0.1"
STATEFUL = ("auth", "catalog", "billing", "scheduler")
"""Services with a database role, a schema and migrations."""
SERVICES = (*STATEFUL, "worker", "gateway")
PORT_BASE = 50050
PORT_BASE_MIN = 1024
PORT_BASE_MAX = 64000
METRICS_OFFSET = 1000
WORKERS_MAX = 16
GATEWAYS_MAX = 8
_PORT_OFFSETS = {"gateway": 0, "catalog": 1, "auth": 2, "billing": 3, "scheduler": 4}
_FIRST_WORKER_OFFSET = 5
_SECOND_GATEWAY_OFFSET = _FIRST_WORKER_OFFSET + WORKERS_MAX
PORTS_SPAN = 32
"""Ports of a suite are below its base and this."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ports:
    """The ports of a suite, all from one number.

    Attributes:
        base: port of the first gateway; the others follow.
    """

    base: int

    def of(self, service: str) -> int:
        """Port of the gRPC server of a service other than a worker."""
        return self.base + _PORT_OFFSETS[service]

    def worker(self, number: int) -> int:
        """Port of the gRPC server of a worker; the first is 1."""
        return self.base + _FIRST_WORKER_OFFSET + number - 1

    def gateway(self, number: int) -> int:
        """Port of the gRPC server of a gateway; the first is 1."""
        return self.base if number == 1 else self.base + _SECOND_GATEWAY_OFFSET + number - 2

    def of_process(self, name: str) -> int:
        """Port of the gRPC server of a process: "auth", "worker-1", "gateway-2"."""
        service, _, number = name.partition("-")
        if service == "gateway":
            return self.gateway(int(number or 1))
        return self.worker(int(number)) if number else self.of(service)


def address(port: int) -> str:
    """host:port on this machine."""
    return f"{HOST}:{port}"


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """The state directory of a suite, .maas by default.

    Attributes:
        root: the directory; absolute.
    """

    root: Path

    @property
    def config(self) -> Path:
        """Rendered configuration, one file a process."""
        return self.root / "config"

    @property
    def secrets(self) -> Path:
        """Tokens, passwords, keys; each file 0600."""
        return self.root / "secrets"

    @property
    def logs(self) -> Path:
        """One file a process."""
        return self.root / "logs"

    @property
    def journal(self) -> Path:
        """The first gateway's usage journal."""
        return self.journal_of("gateway")

    def journal_of(self, process: str) -> Path:
        """The usage journal of a gateway, "gateway" or "gateway-2"; it makes the folder itself."""
        return self.root / process / "journal"

    @property
    def adapters(self) -> Path:
        """LoRA files that workers may load."""
        return self.root / "adapters"

    @property
    def supervisor(self) -> Path:
        """Process id of the supervisor, which holds a lock on this file while it lives."""
        return self.root / "supervisor.pid"

    @property
    def processes(self) -> Path:
        """What the supervisor has started: a later one looks here for what is left of it."""
        return self.root / "processes.json"

    @property
    def digests(self) -> Path:
        """What is known of model files, by path, size and time."""
        return self.root / "models.json"

    @property
    def environment(self) -> Path:
        """Shell lines with keys and addresses, for scripts."""
        return self.root / "dev.env"

    def prepare(self) -> None:
        """Creates the directories, closed to others.

        For root the top one can be passed through, though not read: the account that PostgreSQL
        runs as has its data further down.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o711 if os.geteuid() == 0 else 0o700)
        for folder in (
            self.config,
            self.secrets,
            self.logs,
            self.adapters,
            self.journal.parent,
            self.journal,
        ):
            folder.mkdir(mode=0o700, exist_ok=True)
            folder.chmod(0o700)
