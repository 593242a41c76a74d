"""Makes the secrets of an installation on Kubernetes: python -m tools.deploy.credentials FOLDER.

Writes FOLDER/secrets, where the kustomization in FOLDER takes them from. What is there already
stays as it is, so a file that was removed is the one that is made anew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.local import credential
from tools.local.place import State


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the kustomization.yaml is")
    folder = parser.parse_args(arguments).folder.resolve()
    if not (folder / "kustomization.yaml").is_file():
        sys.stderr.write(
            f"{folder} has no kustomization.yaml: copy deploy/kubernetes/example, name the copy\n"
        )
        return 1
    state = State(root=folder)
    state.secrets.mkdir(mode=0o700, exist_ok=True)
    credential.create(state)
    print(f"{state.secrets}: keep it; the passwords are those that roles.sql has to be given")
    return 0


if __name__ == "__main__":
    sys.exit(main())
