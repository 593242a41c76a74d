"""Checks deploy/docker and deploy/kubernetes by their own tools: python -m tools.deploy.check.

Renders an installation with every kind of worker, as `kubectl apply -k` would, then asks hadolint,
yamllint, kubernetes-validate and the services themselves what they think of it. Needs kubectl, or
kustomize, and the packages of the dependency group `deploy`; builds and installs nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tools.deploy.manifests import (
    MANIFESTS,
    CheckError,
    Document,
    configuration,
    documents,
    pods,
    render,
    renderer,
    run,
)
from tools.local.place import ROOT

DOCKERFILE: Final = ROOT / "deploy" / "docker" / "Dockerfile"
OLDEST: Final = "1.30"
"""The first Kubernetes that has preStop.sleep switched on."""
NEWEST: Final = "1.37"


def check() -> None:
    """Runs all checks.

    Raises:
        CheckError: the first that failed.
    """
    _say("hadolint: deploy/docker/Dockerfile")
    run([_beside("hadolint"), DOCKERFILE])
    _say("yamllint: deploy/kubernetes")
    style = MANIFESTS / ".yamllint"
    run([_beside("yamllint"), "--strict", "--config-file", style, MANIFESTS])
    command = renderer()
    if command is None:
        raise CheckError("neither kubectl nor kustomize is installed: one of them renders")
    _say(f"{Path(command[0]).name}: the example, with every kind of worker")
    text = render(command)
    found = documents(text)
    _check_schemas(text, found)
    _check_configurations(found)


def _check_schemas(text: str, found: Sequence[Document]) -> None:
    """Asks kubernetes-validate, strictly: an unknown field is an error."""
    with tempfile.TemporaryDirectory() as place:
        whole, single = Path(place) / "installation.yaml", Path(place) / "leader-worker-set.yaml"
        whole.write_text(text, encoding="utf-8")
        single.write_text(_pods_of_sets(found), encoding="utf-8")
        for version in (OLDEST, NEWEST):
            _say(f"kubernetes-validate: {len(found)} resources of Kubernetes {version}")
            options = ["--strict", "--no-warn", "--kubernetes-version", version]
            run([_beside("kubernetes-validate"), *options, whole, single])


def _pods_of_sets(found: Sequence[Document]) -> str:
    """The pods of LeaderWorkerSets, of which no schema is at hand, as Pods. JSON is YAML."""
    made = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"{pod.owner}-{pod.role}", "labels": dict(pod.labels)},
            "spec": pod.spec,
        }
        for pod in pods(found)
        if pod.kind == "LeaderWorkerSet"
    ]
    return "\n---\n".join(json.dumps(pod) for pod in made)


def _check_configurations(found: Sequence[Document]) -> None:
    """Asks every service's own --check-config."""
    with tempfile.TemporaryDirectory() as place:
        for pod in pods(found):
            configured = configuration(found, pod)
            if configured is None:
                continue
            service, text = configured
            file = Path(place) / f"{pod.owner}.toml"
            file.write_text(text, encoding="utf-8")
            module = f"services.{service}"
            _say(f"{module} --check-config: {pod.owner}")
            run([sys.executable, "-m", module, "--config", file, "--check-config"])


def _beside(name: str) -> Path:
    """A program of this environment.

    Raises:
        CheckError: it is not installed.
    """
    program = Path(sys.executable).parent / name
    if not program.exists():
        raise CheckError(f"{name} is missing: `make deploy-check` installs it")
    return program


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    """Returns the exit code."""
    try:
        check()
    except CheckError as error:
        sys.stderr.write(f"deploy-check: {error}\n")
        return 1
    _say("deploy-check: all is well")
    return 0


if __name__ == "__main__":
    sys.exit(main())
