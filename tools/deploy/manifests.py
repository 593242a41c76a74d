"""What an installation on Kubernetes would be: deploy/kubernetes, rendered and looked into."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from tools.local import credential
from tools.local.place import ROOT, State

MANIFESTS: Final = ROOT / "deploy" / "kubernetes"
SSH_FILES: Final = ("user", "user.pub", "host", "host.pub")
RUN_WITHIN_S: Final = 60.0
LEFT_OUT: Final = re.compile(r"^( *)# (- \.\./[a-z-]+|- name: maas-ssh|  files: .*secrets/user.*)")
"""What the example has as a comment, since not every cluster can have it."""

Document: TypeAlias = dict[str, "Value"]
Value: TypeAlias = "str | int | float | bool | list[Value] | Document | None"


class CheckError(Exception):
    """A tool is missing, or said no; the message has its words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """What runs in the pods of one workload.

    Attributes:
        owner: name of the Deployment, StatefulSet or LeaderWorkerSet.
        kind: which of them.
        role: "" or, in a LeaderWorkerSet, "leader" or "worker".
        domain: Service that gives each pod a name of its own; empty when there is none.
        labels: of the pods.
        spec: of the pods.
    """

    owner: str
    kind: str
    role: str
    domain: str
    labels: Mapping[str, str]
    spec: Document

    @property
    def first(self) -> str:
        """Name of the first pod; in a Deployment it would end by chance."""
        return f"{self.owner}-0"

    @property
    def containers(self) -> list[Document]:
        """All containers, those that come first included."""
        return [*rows(self.spec.get("initContainers")), *rows(self.spec.get("containers"))]


def run(command: Sequence[str | Path]) -> str:
    """Runs a program in the repository; returns what it printed.

    Raises:
        CheckError: it is not there, took too long or failed.
    """
    try:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=False,
            timeout=RUN_WITHIN_S,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise CheckError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise CheckError(f"{Path(command[0]).name} says:\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


def renderer() -> list[str] | None:
    """The command that renders a kustomization; None without kubectl and kustomize."""
    for name, argument in (("kubectl", "kustomize"), ("kustomize", "build")):
        program = shutil.which(name)
        if program is not None:
            return [program, argument]
    return None


def render(command: Sequence[str]) -> str:
    """Renders the example with every kind of worker; returns YAML.

    Raises:
        CheckError: the kustomization is wrong.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "kubernetes"
        shutil.copytree(MANIFESTS, folder, ignore=shutil.ignore_patterns("secrets"))
        complete(folder / "example")
        return run([*command, folder / "example"])


def complete(example: Path) -> None:
    """Makes a copy of the example whole: all kinds of workers, and secrets that open nothing."""
    file = example / "kustomization.yaml"
    lines = file.read_text(encoding="utf-8").splitlines()
    whole = "\n".join(LEFT_OUT.sub(r"\1\2", line) for line in lines)
    file.write_text(f"{whole}\n", encoding="utf-8")
    state = State(root=example)
    state.secrets.mkdir(mode=0o700)
    credential.create(state)
    for name in SSH_FILES:
        credential.write(state.secrets / name, "a key\n")


def documents(text: str) -> list[Document]:
    """Parses YAML.

    Raises:
        CheckError: PyYAML is missing.
    """
    try:
        yaml = importlib.import_module("yaml")
    except ModuleNotFoundError as error:
        raise CheckError("PyYAML is missing: make setup-dev") from error
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [document for document in yaml.load_all(text, loader) if document]


def at(value: Value, *path: str) -> Value:
    """What stands at a path of keys; None when nothing does."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def table(value: Value) -> Document:
    """A mapping; empty for nothing."""
    return value if isinstance(value, dict) else {}


def rows(value: Value) -> list[Document]:
    """The mappings of a list; empty for nothing."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def texts(value: Value) -> list[str]:
    """The values of a list as texts; empty for nothing."""
    return [str(word) for word in value] if isinstance(value, list) else []


def words(value: Value) -> dict[str, str]:
    """A mapping whose values are texts."""
    return {key: str(text) for key, text in table(value).items()}


def name_of(document: Document) -> str:
    """Name of a resource."""
    return str(at(document, "metadata", "name"))


def named(found: Sequence[Document], kind: str) -> dict[str, Document]:
    """Resources of a kind by name."""
    return {name_of(document): document for document in found if document.get("kind") == kind}


def pods(found: Sequence[Document]) -> Iterator[Pod]:
    """The pods of every workload."""
    group = ("spec", "leaderWorkerTemplate")
    places: dict[str, list[tuple[str, tuple[str, ...]]]] = {
        "Deployment": [("", ("spec", "template"))],
        "StatefulSet": [("", ("spec", "template"))],
        "LeaderWorkerSet": [
            ("leader", (*group, "leaderTemplate")),
            ("worker", (*group, "workerTemplate")),
        ],
    }
    for document in found:
        kind = str(document.get("kind"))
        # A LeaderWorkerSet makes itself a headless Service of its own name.
        domain = at(document, "spec", "serviceName") or ""
        for role, path in places.get(kind, []):
            template = at(document, *path)
            yield Pod(
                owner=name_of(document),
                kind=kind,
                role=role,
                domain=name_of(document) if kind == "LeaderWorkerSet" else str(domain),
                labels=words(at(template, "metadata", "labels")),
                spec=table(at(template, "spec")),
            )


def files_of(found: Sequence[Document], pod: Pod, container: Document) -> dict[str, str]:
    """Files that a container has from ConfigMaps and Secrets: path and text.

    The text of a Secret is in Base64, as in its resource.
    """
    volumes = {str(volume.get("name")): volume for volume in rows(pod.spec.get("volumes"))}
    result: dict[str, str] = {}
    for mount in rows(container.get("volumeMounts")):
        volume = volumes.get(str(mount.get("name")), {})
        for source in rows(at(volume, "projected", "sources")) or [volume]:
            for file, text in _files(found, source).items():
                result[f"{mount.get('mountPath')}/{file}"] = text
    return result


def _files(found: Sequence[Document], source: Document) -> dict[str, str]:
    """Files of a volume that is a ConfigMap or a Secret, by name; none of any other."""
    for kind, key in (("ConfigMap", "configMap"), ("Secret", "secret")):
        reference = table(source.get(key))
        if not reference:
            continue
        name = str(reference.get("name") or reference.get("secretName"))
        try:
            content = words(named(found, kind)[name].get("data"))
        except KeyError:
            raise CheckError(f"there is no {kind} {name}") from None
        items = rows(reference.get("items"))
        if not items:
            return content
        return {str(item["path"]): content[str(item["key"])] for item in items}
    return {}


def configuration(found: Sequence[Document], pod: Pod) -> tuple[str, str] | None:
    """Name of the service and text of the file that its process reads; None for other pods.

    The text is that of the first pod: what an init container fills in is filled in by the very
    program that it runs.
    """
    for container in pod.containers:
        for path, text in files_of(found, pod, container).items():
            if path.endswith(".toml"):
                command = texts(container.get("command"))
                return Path(path).stem, _filled_in(command, path, text, pod.first)
    return None


def _filled_in(command: Sequence[str], path: str, text: str, name: str) -> str:
    """What the command of an init container makes of a file; the text itself without a command."""
    if not command:
        return text
    with tempfile.TemporaryDirectory() as place:
        source, target = Path(place) / "source", Path(place) / "target"
        source.write_text(text, encoding="utf-8")
        ready = [word.replace("$(POD_NAME)", name).replace(path, str(source)) for word in command]
        run([re.sub(r"^w /\S+$", f"w {target}", word) for word in ready])
        return target.read_text(encoding="utf-8")
