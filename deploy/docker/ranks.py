"""Starts one engine over several pods of a LeaderWorkerSet: MPI over ssh, our worker in rank 0.

    ranks.py lead      in the leader's pod: waits for the others, runs mpirun, passes signals on
    ranks.py follow    in every other pod: lets the leader in, and nobody else
    ranks.py worker    what trtllm-llmapi-launch starts as the program of rank 0
    ranks.py outlast   before another pod ends: waits until mpirun has taken its ranks away

mpirun starts a rank for each GPU; each runs TensorRT-LLM's launcher, which runs its given program
in rank 0 only and lets all others wait for work. That program is our worker; its child process
makes the engine and reaches all ranks through the launcher.

Two things that neither mpirun nor the launcher do are done here. A SIGTERM goes to the worker, so
that it can drain: mpirun itself would kill every rank after a second. And when the worker has
ended, the rest is ended: the launcher would keep the ranks waiting for a program that is gone.

Runs on NVIDIA's interpreter, so it needs nothing but the standard library.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SSH_PORT = 2222
KEYS = Path("/run/secrets/maas-ssh")
"""Files of the Secret: user, user.pub (the leader's key), host, host.pub (every pod's own)."""
STATE = Path("/run/maas")
WORKER = ("/opt/maas/venv/bin/python", "-m", "services.worker", "--config", "/run/maas/worker.toml")
FOLLOWERS_WITHIN_S = 600.0
"""Nodes are found, images pulled: the leader waits this long for the last of its followers."""
END_WITHIN_S = 5.0
"""From the end of the worker to the end of mpirun, before it is told to end, and then killed."""
POLL_S = 0.5
MPI_DAEMONS = frozenset({"orted", "prted"})
"""What OpenMPI 4 and 5 leave in a pod as long as it has ranks there."""
PASSED_ON = ("LD_LIBRARY_PATH", "PATH", "HOME", "PYTHONDONTWRITEBYTECODE")
PASSED_ON_PREFIXES = ("CUDA_", "HF_", "NCCL_", "NVIDIA_", "TLLM_", "TRTLLM_", "UCX_")
EXIT_FAILED = 1


class LaunchError(Exception):
    """The group cannot be started; the message says what to look at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The pods of one engine.

    Attributes:
        hosts: address of each pod, the leader's first.
        gpus: of each pod.
    """

    hosts: tuple[str, ...]
    gpus: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Group:
        """Reads what the LeaderWorkerSet and the manifest put into the environment.

        Raises:
            LaunchError: a variable is missing or no number.
        """
        try:
            leader = environment["LWS_LEADER_ADDRESS"]
            size = int(environment["LWS_GROUP_SIZE"])
            gpus = int(environment["GPUS_PER_POD"])
        except (KeyError, ValueError) as error:
            raise LaunchError(
                f"{error}: LWS_LEADER_ADDRESS and LWS_GROUP_SIZE come from the LeaderWorkerSet, "
                "GPUS_PER_POD from the manifest"
            ) from error
        name, _, domain = leader.partition(".")
        followers = (f"{name}-{number}.{domain}" for number in range(1, size))
        return cls(hosts=(leader, *followers), gpus=gpus)

    def mpirun(self, environment: Mapping[str, str]) -> list[str]:
        """The command that starts all ranks, those of the leader's pod first."""
        mpirun = shutil.which("mpirun", path=environment.get("PATH"))
        if mpirun is None:
            raise LaunchError("mpirun is not in PATH: is this NVIDIA's image?")
        command = [mpirun, "--prefix", str(Path(mpirun).resolve().parent.parent)]
        command += ["-n", str(len(self.hosts) * self.gpus)]
        command += ["--host", ",".join(f"{host}:{self.gpus}" for host in self.hosts)]
        # Plain sockets: MPI only says what is to be done, data goes through NCCL. And no binding to
        # cores, which the worker would inherit from rank 0.
        command += ["--mca", "pml", "ob1", "--bind-to", "none"]
        for name in passed_on(environment):
            command += ["-x", name]
        # The launcher splits its arguments at blanks, so none may have one.
        return [*command, "trtllm-llmapi-launch", "/usr/bin/python3", str(Path(__file__)), "worker"]


def passed_on(environment: Mapping[str, str]) -> list[str]:
    """Names of the variables that every rank gets."""
    return sorted(
        name for name in environment if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)
    )


def ssh_config(keys: Path) -> str:
    """What ssh has to know: the port, our key, and whose host keys to believe."""
    lines = [
        "Host *",
        f"  Port {SSH_PORT}",
        f"  IdentityFile {keys / 'user'}",
        "  IdentitiesOnly yes",
        "  StrictHostKeyChecking yes",
        "  UserKnownHostsFile ~/.ssh/known_hosts",
        "  BatchMode yes",
        "  ConnectTimeout 10",
    ]
    return "\n".join(lines) + "\n"


def sshd_config(keys: Path, environment: Mapping[str, str]) -> str:
    """What sshd has to know: one key may enter, with the environment of this container."""
    lines = [
        f"Port {SSH_PORT}",
        f"HostKey {keys / 'host'}",
        f"AuthorizedKeysFile {keys / 'user.pub'}",
        "AuthenticationMethods publickey",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        "AllowAgentForwarding no",
        "AllowTcpForwarding no",
        "X11Forwarding no",
        "PermitUserRC no",
        "UsePAM no",
        "PidFile none",
        # A mounted Secret is a folder of links that anybody may read; it is read-only all the same.
        "StrictModes no",
    ]
    # sshd reads one SetEnv only, with all variables; MPI's daemon has to find its libraries.
    pairs = " ".join(f'{name}="{environment[name]}"' for name in passed_on(environment))
    return "\n".join([*lines, f"SetEnv {pairs}"]) + "\n"


def write_ssh(home: Path, keys: Path) -> None:
    """Writes the leader's ~/.ssh."""
    folder = home / ".ssh"
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / "config").write_text(ssh_config(keys), encoding="utf-8")
    host = (keys / "host.pub").read_text(encoding="utf-8").strip()
    (folder / "known_hosts").write_text(f"* {host}\n", encoding="utf-8")


def wait_for(
    hosts: Sequence[str],
    answers: Callable[[str], bool],
    *,
    within_s: float,
    pause: Callable[[float], None],
    now: Callable[[], float],
) -> None:
    """Returns when every host has answered once.

    Raises:
        LaunchError: with the hosts that did not in time.
    """
    missing = list(hosts)
    deadline_s = now() + within_s
    while True:
        missing = [host for host in missing if not answers(host)]
        if not missing:
            return
        if now() >= deadline_s:
            raise LaunchError(
                f"no answer on port {SSH_PORT} within {within_s:.0f} s from {', '.join(missing)}"
            )
        pause(POLL_S)


def has_open_port(host: str) -> bool:
    """Whether sshd of a follower listens; a name that is not known yet counts as no."""
    try:
        with socket.create_connection((host, SSH_PORT), timeout=2.0):
            return True
    except OSError:
        return False


class Leader:
    """Runs mpirun until the worker in it has ended, or mpirun itself has.

    Args:
        state: folder that is shared with `run_worker`, which leaves there the process id of the
            worker and, at the end, its exit code.
    """

    def __init__(self, state: Path) -> None:
        self._pid = state / "worker.pid"
        self._exit = state / "worker.exit"
        self._is_told = False
        self._mpirun: subprocess.Popen[bytes] | None = None

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Returns the exit code of the worker; that of mpirun if it ended before the worker."""
        self._pid.unlink(missing_ok=True)
        self._exit.unlink(missing_ok=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())
        self._mpirun = subprocess.Popen(command, env=dict(environment))
        if self._is_told:
            self.stop()
        while self._mpirun.poll() is None and not self._exit.exists():
            time.sleep(POLL_S)
        code = self._end(self._mpirun)
        return int(self._exit.read_text(encoding="ascii")) if self._exit.exists() else code

    def stop(self) -> None:
        """Lets the worker drain; without a worker there is nothing to wait for."""
        self._is_told = True
        if self._exit.exists():
            return
        try:
            os.kill(int(self._pid.read_text(encoding="ascii")), signal.SIGTERM)
        except (OSError, ValueError):
            if self._mpirun is not None:
                self._mpirun.terminate()

    @staticmethod
    def _end(mpirun: subprocess.Popen[bytes]) -> int:
        """Ends mpirun, politely first. Ranks that were left without it end with the pod."""
        for end in (None, mpirun.terminate, mpirun.kill):
            if end is not None:
                end()
            try:
                return mpirun.wait(END_WITHIN_S) or 0
            except subprocess.TimeoutExpired:
                continue
        return EXIT_FAILED


def run_worker(command: Sequence[str], state: Path) -> int:
    """Runs the worker, tells the leader's process its id and how it ended."""
    worker = subprocess.Popen(command)
    replace(state / "worker.pid", str(worker.pid))
    code = worker.wait()
    # Killed by a signal: what a shell would say.
    code = 128 - code if code < 0 else code
    replace(state / "worker.exit", str(code))
    return code


def replace(path: Path, text: str) -> None:
    """Writes a file in one step: whoever polls for it never reads half of it."""
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(text, encoding="ascii")
    scratch.replace(path)


def lead(environment: Mapping[str, str]) -> int:
    """The leader's pod."""
    group = Group.of(environment)
    write_ssh(Path(environment["HOME"]), KEYS)
    command = group.mpirun(environment)
    wait_for(
        group.hosts[1:],
        has_open_port,
        within_s=FOLLOWERS_WITHIN_S,
        pause=time.sleep,
        now=time.monotonic,  # noqa: TID251 - this file runs without libs
    )
    # Pods are known by their full names only; OpenMPI 4 and 5 cut them unless told not to.
    names = {"OMPI_MCA_orte_keep_fqdn_hostnames": "1", "PRTE_MCA_prte_keep_fqdn_hostnames": "1"}
    return Leader(STATE).run(command, {**environment, **names})


def follow(environment: Mapping[str, str]) -> int:
    """Every other pod: becomes sshd. Its ranks end with mpirun, and with the pod."""
    config = STATE / "sshd_config"
    config.write_text(sshd_config(KEYS, environment), encoding="utf-8")
    sshd = "/usr/sbin/sshd"
    os.execv(sshd, [sshd, "-D", "-e", "-f", str(config)])  # noqa: S606 - no shell wanted


def has_ranks(processes: Path) -> bool:
    """Whether a daemon of mpirun is among the processes of this pod."""
    for name in processes.glob("[0-9]*/comm"):
        try:
            if name.read_text(encoding="utf-8").strip() in MPI_DAEMONS:
                return True
        except OSError:
            continue  # It has just ended.
    return False


def outlast() -> int:
    """Returns when the ranks are gone. The bound is the pod's grace period."""
    while has_ranks(Path("/proc")):
        time.sleep(POLL_S)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    environment = os.environ  # noqa: TID251 - LeaderWorkerSet and MPI speak through it
    match list(arguments):
        case ["lead"]:
            return lead(environment)
        case ["follow"]:
            return follow(environment)
        case ["worker"]:
            return run_worker(WORKER, STATE)
        case ["outlast"]:
            return outlast()
        case _:
            raise LaunchError("usage: ranks.py lead | follow | worker | outlast")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (LaunchError, OSError) as error:
        sys.exit(f"ranks: {error}")
