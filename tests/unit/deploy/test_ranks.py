"""An engine over several pods: who waits for whom, who is told to end, and what is passed on."""

from __future__ import annotations

import importlib.util
import os
import signal
import stat
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest

from tools.local.place import ROOT

ENVIRONMENT = {
    "LWS_LEADER_ADDRESS": "big-0.big.maas",
    "LWS_GROUP_SIZE": "3",
    "GPUS_PER_POD": "8",
    "LD_LIBRARY_PATH": "/usr/local/cuda/lib64",
    "NCCL_DEBUG": "WARN",
    "KUBERNETES_PORT": "tcp://10.0.0.1:443",
}


@pytest.fixture(scope="module")
def ranks() -> ModuleType:
    path = ROOT / "deploy" / "docker" / "ranks.py"
    spec = importlib.util.spec_from_file_location("ranks", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look themselves up.
    sys.modules["ranks"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def quick(ranks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(ranks, "POLL_S", 0.005)
    monkeypatch.setattr(ranks, "END_WITHIN_S", 0.2)
    return ranks


def with_mpirun(folder: Path) -> dict[str, str]:
    program = folder / "mpi" / "bin" / "mpirun"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {**ENVIRONMENT, "PATH": str(program.parent)}


def test_the_pods_of_a_group_are_known_by_their_names(ranks: ModuleType) -> None:
    group = ranks.Group.of(ENVIRONMENT)

    assert group.hosts == ("big-0.big.maas", "big-0-1.big.maas", "big-0-2.big.maas")
    assert group.gpus == 8


@pytest.mark.parametrize("name", ["LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE", "GPUS_PER_POD"])
def test_a_variable_that_is_missing_is_named(ranks: ModuleType, name: str) -> None:
    environment = {key: value for key, value in ENVIRONMENT.items() if key != name}

    with pytest.raises(ranks.LaunchError, match=name):
        ranks.Group.of(environment)


def test_a_rank_is_started_for_each_gpu_and_the_leaders_come_first(
    ranks: ModuleType, tmp_path: Path
) -> None:
    environment = with_mpirun(tmp_path)
    command = ranks.Group.of(environment).mpirun(environment)

    assert command[command.index("-n") + 1] == "24"
    hosts = "big-0.big.maas:8,big-0-1.big.maas:8,big-0-2.big.maas:8"
    assert command[command.index("--host") + 1] == hosts
    assert command[command.index("--prefix") + 1] == str(tmp_path / "mpi")
    passed = {command[at + 1] for at, word in enumerate(command) if word == "-x"}
    assert passed == {"LD_LIBRARY_PATH", "NCCL_DEBUG", "PATH"}


def test_the_launchers_program_has_no_blank_in_its_words(ranks: ModuleType, tmp_path: Path) -> None:
    environment = with_mpirun(tmp_path)
    command = ranks.Group.of(environment).mpirun(environment)
    launched = command[command.index("trtllm-llmapi-launch") + 1 :]

    assert launched[-1] == "worker"
    assert [word for word in launched if " " in word] == []


def test_without_mpirun_it_is_said_what_to_look_at(ranks: ModuleType, tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "PATH": str(tmp_path)}

    with pytest.raises(ranks.LaunchError, match="mpirun is not in PATH"):
        ranks.Group.of(environment).mpirun(environment)


def test_only_the_leaders_key_opens_a_pod_and_only_its_own_host_key_is_believed(
    ranks: ModuleType, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "host.pub").write_text("ssh-ed25519 AAAA maas\n")
    ranks.write_ssh(tmp_path, keys)
    daemon = ranks.sshd_config(keys, ENVIRONMENT)

    assert (tmp_path / ".ssh" / "known_hosts").read_text() == "* ssh-ed25519 AAAA maas\n"
    assert "StrictHostKeyChecking yes" in (tmp_path / ".ssh" / "config").read_text()
    assert "PasswordAuthentication no" in daemon
    assert f"AuthorizedKeysFile {keys}/user.pub" in daemon
    assert 'SetEnv LD_LIBRARY_PATH="/usr/local/cuda/lib64" NCCL_DEBUG="WARN"' in daemon
    assert "KUBERNETES" not in daemon


def test_it_waits_for_every_pod_and_asks_none_again(ranks: ModuleType) -> None:
    asked: list[str] = []

    def answers(host: str) -> bool:
        asked.append(host)
        return host == "a" or asked.count(host) == 3

    ranks.wait_for(["a", "b"], answers, within_s=60.0, pause=lambda _: None, now=lambda: 0.0)

    assert asked == ["a", "b", "b", "b"]


def test_a_pod_that_never_comes_is_named(ranks: ModuleType) -> None:
    clock = iter(range(1000))

    with pytest.raises(ranks.LaunchError, match=r"within 20 s from b$"):
        ranks.wait_for(
            ["a", "b"],
            lambda host: host == "a",
            within_s=20.0,
            pause=lambda _: None,
            now=lambda: float(next(clock)),
        )


def launcher(folder: Path, worker: str, *, after: str) -> list[str]:
    """What mpirun is to us: a process below which a worker runs, and which may outlive it."""
    script = folder / "launcher.py"
    script.write_text(
        "import subprocess, sys, time\n"
        f"sys.path.insert(0, {str(ROOT / 'deploy' / 'docker')!r})\n"
        "import ranks\n"
        "from pathlib import Path\n"
        f"ranks.run_worker([sys.executable, '-c', {worker!r}], Path({str(folder)!r}))\n"
        f"{after}\n"
    )
    return [sys.executable, str(script)]


FOR_EVER = "time.sleep(60)"
DRAINS = (
    "import pathlib, signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
    # Nobody told it: it ends otherwise, and the test fails.
    "signal.alarm(10)\n"
    # Until its id is known, nobody can tell it anything.
    "while not pathlib.Path({pid!r}).exists(): time.sleep(0.002)\n"
    "pathlib.Path({ready!r}).touch()\n"
    "signal.pause()\n"
)


def run_leader(ranks: ModuleType, folder: Path, command: list[str]) -> int:
    """Runs it as the process would, and puts the handlers of this process back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return int(ranks.Leader(folder).run(command, {}))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_this_process_when(there: Path) -> threading.Thread:
    """Sends SIGTERM, as tini would, as soon as a file is there."""

    def wait() -> None:
        pause = threading.Event()
        while not there.exists():
            pause.wait(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_the_end_of_the_worker_ends_ranks_that_would_wait_for_ever(
    quick: ModuleType, tmp_path: Path
) -> None:
    command = launcher(tmp_path, "raise SystemExit(3)", after=FOR_EVER)

    assert run_leader(quick, tmp_path, command) == 3


def test_a_worker_that_was_killed_is_told_apart(quick: ModuleType, tmp_path: Path) -> None:
    worker = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"

    assert run_leader(quick, tmp_path, launcher(tmp_path, worker, after="")) == 137


def test_sigterm_reaches_the_worker_and_not_mpirun(quick: ModuleType, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    worker = DRAINS.format(ready=str(ready), pid=str(tmp_path / "worker.pid"))
    told = end_this_process_when(ready)

    assert run_leader(quick, tmp_path, launcher(tmp_path, worker, after="")) == 7
    told.join(5.0)


def test_an_mpirun_that_fails_ends_the_pod(quick: ModuleType, tmp_path: Path) -> None:
    assert run_leader(quick, tmp_path, [sys.executable, "-c", "raise SystemExit(5)"]) == 5


def test_a_pod_outlasts_the_ranks_in_it(ranks: ModuleType, tmp_path: Path) -> None:
    for number, name in ((1, "tini"), (17, "orted"), (18, "python3")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "comm").write_text(f"{name}\n")

    assert ranks.has_ranks(tmp_path)
    (tmp_path / "17" / "comm").unlink()
    assert not ranks.has_ranks(tmp_path)
