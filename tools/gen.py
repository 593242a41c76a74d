"""Generates gen/ from protos/: message classes, service stubs and their types.

The proto root is the import root, so nothing is rewritten afterwards. Never edits anything
outside the target folder.

    python -m tools.gen            writes gen/
    python -m tools.gen --check    fails when gen/ is not what protos/ say
"""

from __future__ import annotations

import argparse
import filecmp
import importlib.resources
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
TARGET = ROOT / "gen"
PLUGINS = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")


def generate(target: Path) -> None:
    """Writes the Python for every proto file below `target`."""
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    scripts = Path(sysconfig.get_path("scripts"))
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-I{PROTOS}",
            f"-I{well_known}",
            *(f"--plugin={name}={scripts / name}" for name in PLUGINS),
            f"--python_out={target}",
            f"--grpc_python_out={target}",
            f"--mypy_out=quiet:{target}",
            f"--mypy_grpc_out=quiet:{target}",
            *sources,
        ],
        check=True,
    )
    for folder in [path for path in (target / "maas").rglob("*") if path.is_dir()]:
        (folder / "__init__.py").touch()
    (target / "maas" / "__init__.py").touch()
    (target / "maas" / "py.typed").touch()


def differences(left: Path, right: Path) -> list[str]:
    """Names files that are in one folder only, or differ."""
    compared = filecmp.dircmp(left, right, ignore=["__pycache__"])
    found = [*compared.left_only, *compared.right_only]
    _, mismatch, errors = filecmp.cmpfiles(left, right, compared.common_files, shallow=False)
    found += [*mismatch, *errors]
    for name in compared.common_dirs:
        found += [f"{name}/{inner}" for inner in differences(left / name, right / name)]
    return sorted(found)


def main() -> int:
    """Generates, or checks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        generate(fresh)
        if arguments.check:
            stale = differences(fresh / "maas", TARGET / "maas")
            if stale:
                sys.stderr.write("gen/ is stale, run make gen: " + ", ".join(stale) + "\n")
                return 1
            return 0
        shutil.rmtree(TARGET / "maas", ignore_errors=True)
        shutil.copytree(fresh / "maas", TARGET / "maas")
    return 0


if __name__ == "__main__":
    sys.exit(main())
