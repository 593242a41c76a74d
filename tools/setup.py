"""Makes .venv with the locked dependencies, once; says what it does and how long it takes.

    python3 tools/setup.py           what running needs
    python3 tools/setup.py --dev     and what testing needs
    python3 tools/setup.py --bench   and, beside both, the one program that only benchmarks need
    python3 tools/setup.py --deploy  likewise, what checks images and manifests

Runs on a bare Python, so it imports nothing but the standard library, and has to be understood by
old ones far enough to say that they are too old: hence the quoted types. Which index packages come
from is the user's own configuration of pip. A stamp in .venv holds the hash of what was installed:
when nothing has changed the script ends at once.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "setup.log"
PLACE = VENV / "place"
RUNTIME_LOCK = ROOT / "requirements.lock"
DEV_LOCK = ROOT / "requirements-dev.lock"
BENCH_LOCK = ROOT / "requirements-bench.lock"
DEPLOY_LOCK = ROOT / "requirements-deploy.lock"
# Additions to an environment, and not the suite itself.
ADDITIONS = (BENCH_LOCK, DEPLOY_LOCK)
OLDEST = (3, 11)
NEWEST = (3, 13)
TAIL_LINES = 15
COLLECTED = re.compile(r"Collecting ([A-Za-z0-9._-]+)==([^\s;]+)")


def say(text: str) -> None:
    """Prints a line now, also into a pipe."""
    print(text, flush=True)


def fail(text: str) -> NoReturn:
    """Ends with a message for the user."""
    sys.stderr.write(f"setup: {text}\n")
    sys.exit(1)


def is_supported(version: "tuple[int, ...]") -> bool:
    """Whether this suite runs on that Python."""
    return OLDEST <= version[:2] <= NEWEST


def use_supported_python() -> None:
    """Goes on in another Python of this machine when this one is too old or too new."""
    if is_supported(sys.version_info[:2]):
        return
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found is not None and _runs(found, minor):
            os.execv(found, [found, *sys.argv])  # noqa: S606 - no shell wanted
    fail(
        "Python {}.{} to {}.{} is needed, this is {}.{}. Install one, or name it: "
        "make PYTHON=/path/to/python3.12".format(*OLDEST, *NEWEST, *sys.version_info[:2])
    )


def _runs(program: str, minor: int) -> bool:
    """Whether a program is that Python: version managers put shims that only complain."""
    text = f"import sys; sys.exit(sys.version_info[:2] != (3, {minor}))"
    # Not run(capture_output=...), which a Python that is too old may not have yet.
    quiet = subprocess.DEVNULL
    return subprocess.call([program, "-c", text], stdout=quiet, stderr=quiet) == 0


def stamp_of(locks: "list[Path]") -> str:
    """Hash of everything that decides what a lock file puts into .venv."""
    digest = hashlib.sha256()
    # An addition is not the suite itself: what stands about that elsewhere is of no concern.
    is_addition = [path.name for path in locks] in [[path.name] for path in ADDITIONS]
    for path in locks if is_addition else [*locks, ROOT / "pyproject.toml"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def place() -> str:
    """What a virtual environment cannot survive a change of: its folder and its Python."""
    return f"{ROOT} {sys.version_info[0]}.{sys.version_info[1]}"


def read(path: Path) -> str:
    """Text of a file, empty when it is not there."""
    return path.read_text() if path.exists() else ""


def make_environment() -> None:
    """Creates .venv; replaces one that this script made for another folder or another Python.

    An environment that someone else made is never removed: it is used if it can be.
    """
    if PYTHON.exists() and read(PLACE) == place():
        return
    if VENV.exists() and not PLACE.exists():
        adopt_environment()
        return
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            fail(
                f"this Python ({sys.executable}) lacks the module {module}. On Debian and Ubuntu: "
                f"apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv"
            )
    say(f"setup: virtual environment in {VENV.name}, Python {sys.version.split()[0]}")
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir()
    PLACE.write_text("unfinished")
    # Of the Python below, should this be the very environment that is replaced.
    base = getattr(sys, "_base_executable", sys.executable)
    run = subprocess.run(
        [base, "-m", "venv", str(VENV)], capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        fail(f"venv failed:\n{run.stdout}{run.stderr}")
    PLACE.write_text(place())


def adopt_environment() -> None:
    """Takes over an environment that was there before, if it has pip and the same Python."""
    text = "import sys, pip; sys.exit(list(sys.version_info[:2]) != [{}, {}])".format(
        *sys.version_info[:2]
    )
    works = PYTHON.exists() and (
        subprocess.run([str(PYTHON), "-c", text], capture_output=True, check=False).returncode == 0
    )
    if not works:
        fail(f"{VENV} was not made by this script and cannot be used: remove it and try again")
    say(f"setup: using the virtual environment that is in {VENV.name} already")
    PLACE.write_text(place())


def pip_install(arguments: "list[str]", total: int) -> None:
    """Runs pip install, a line of ours for each package; shows pip's own words if it fails."""
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    number = 0
    with LOG.open("a") as log:
        process = subprocess.Popen(
            [*command, "--progress-bar", "off", *arguments],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            match = COLLECTED.match(line)
            number += match is not None or line.startswith("Requirement already satisfied")
            if match is not None:
                say(f"  [{number}/{total}] {match[1]} {match[2]}")
            elif line.startswith("Installing collected packages"):
                say("  unpacking")
    if process.wait() != 0:
        lines = LOG.read_text().splitlines()[-TAIL_LINES:]
        fail("pip failed:\n  " + "\n  ".join(lines) + f"\nAll of it: {LOG}")


def install(lock: Path) -> None:
    """Installs a lock file, hashes checked, and the suite itself from where it stands.

    The suite does not come with an addition.
    """
    LOG.write_text("")
    say(f"setup: packages of {lock.name}")
    total = len(set(re.findall(r"^[A-Za-z0-9._-]+(?===)", lock.read_text(), re.MULTILINE)))
    pip_install(["--require-hashes", "-r", str(lock)], total)
    if lock not in ADDITIONS:
        pip_install(["--no-deps", "--no-build-isolation", "--editable", "."], 1)


def main() -> int:
    """Brings .venv up to date; returns the exit code."""
    use_supported_python()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dev", action="store_true", help="what testing needs, too")
    parser.add_argument("--bench", action="store_true", help="what testing and benchmarks need")
    parser.add_argument("--deploy", action="store_true", help="what testing and linters need")
    asked = parser.parse_args()
    with Path(__file__).open() as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        wants_dev = asked.dev or asked.bench or asked.deploy
        bring_up_to_date(DEV_LOCK if wants_dev else RUNTIME_LOCK)
        for is_wanted, lock in ((asked.bench, BENCH_LOCK), (asked.deploy, DEPLOY_LOCK)):
            if is_wanted:
                bring_up_to_date(lock)
    return 0


def bring_up_to_date(lock: Path) -> None:
    """Installs a lock file unless that has been done already; the caller holds the guard."""
    locks = (RUNTIME_LOCK, DEV_LOCK, *ADDITIONS)
    stamps = {path: VENV / f"stamp-{path.name}" for path in locks}
    if read(stamps[lock]) == stamp_of([lock]) and read(PLACE) == place():
        return
    started_s = time.perf_counter()
    make_environment()
    install(lock)
    say(f"setup: done in {time.perf_counter() - started_s:.0f} s")
    # Of what is both in the development lock and in the other one, the versions are equal.
    for path in (RUNTIME_LOCK, DEV_LOCK) if lock == DEV_LOCK else (lock,):
        stamps[path].write_text(stamp_of([path]))


if __name__ == "__main__":
    sys.exit(main())
