"""What is in the images, as far as it can be seen without building them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tools.deploy.manifests import MANIFESTS
from tools.local.place import ROOT

FOLDER = ROOT / "deploy" / "docker"
FINAL = ("services", "worker", "worker-multi-node")


@dataclass(slots=True)
class Stage:
    base: str
    words: list[tuple[str, str]] = field(default_factory=list)

    def last(self, instruction: str) -> str:
        return [text for word, text in self.words if word == instruction][-1]


def instructions() -> list[tuple[str, str]]:
    """Instruction and arguments, comments and line ends taken away."""
    text = (FOLDER / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = (line.partition(" ") for line in joined.splitlines() if line.strip())
    return [(word, arguments.strip()) for word, _, arguments in pairs]


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    result: dict[str, Stage] = {}
    current: Stage | None = None
    for word, text in instructions():
        if word == "FROM":
            base, _, name = text.partition(" AS ")
            current = result[name] = Stage(base)
        elif current is not None:
            current.words.append((word, text))
    return result


def arguments() -> dict[str, str]:
    """Defaults of the build's arguments."""
    pairs = (text.partition("=") for word, text in instructions() if word == "ARG")
    return {name: value for name, _, value in pairs}


def test_foreign_images_are_arguments_with_a_version(stages: dict[str, Stage]) -> None:
    foreign = {
        stage.base
        for stage in stages.values()
        if stage.base not in stages and stage.base != "scratch"
    }

    assert foreign == {f"${{{name}}}" for name in arguments()}
    assert [image for image in arguments().values() if not re.search(r":\d+\.\d+", image)] == []


def test_packages_are_those_of_the_lock_files_and_no_others(stages: dict[str, Stage]) -> None:
    installs = {
        name: text
        for name, stage in stages.items()
        for word, text in stage.words
        if word == "RUN" and "pip install" in text
    }
    locks = {
        name: re.findall(r"--requirement /build/(\S+)", text) for name, text in installs.items()
    }

    assert locks == {
        "packages": ["requirements.lock"],
        "packages-trtllm": ["requirements-trtllm.lock"],
    }
    assert all("--require-hashes --only-binary :all:" in text for text in installs.values())


def test_a_worker_has_the_versions_that_were_tested() -> None:
    pin = re.compile(r"^([a-z0-9-]+==\S+)", flags=re.MULTILINE)
    tested = set(pin.findall((ROOT / "requirements-dev.lock").read_text()))
    worker = set(pin.findall((ROOT / "requirements-trtllm.lock").read_text()))
    services = set(pin.findall((ROOT / "requirements.lock").read_text()))

    assert services < worker
    assert worker <= tested
    assert [name for name in worker if name.startswith("tokenizers==")]


def test_the_builder_gets_what_is_copied_and_nothing_else(stages: dict[str, Stage]) -> None:
    copied = {
        source
        for stage in stages.values()
        for word, text in stage.words
        if word == "COPY" and not text.startswith("--from")
        for source in text.split()[:-1]
    }
    rules = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    let_in = {line[1:].removesuffix("/**") for line in rules if line.startswith("!")}

    assert next(line for line in rules if not line.startswith("#")) == "**"
    assert copied == let_in
    assert [source for source in copied if not (ROOT / source).exists()] == []


@pytest.mark.parametrize("name", FINAL)
def test_a_process_is_nobody_and_hears_signals(stages: dict[str, Stage], name: str) -> None:
    stage = stages[name]
    parent = stages.get(stage.base)
    entry = next(
        text
        for words in (stage.words, parent.words if parent else [])
        for word, text in words
        if word == "ENTRYPOINT"
    )

    assert stage.last("USER") == "10001:10001"
    assert json.loads(entry)[:2] == ["/usr/bin/tini", "--"]
    assert isinstance(json.loads(stage.last("CMD")), list)


def test_no_image_is_given_a_secret_or_a_configuration(stages: dict[str, Stage]) -> None:
    words = [text for stage in stages.values() for _, text in stage.words]

    assert [text for text in words if re.search(r"(?i)password|token|secret|\.toml /", text)] == []


@pytest.mark.parametrize("folder", sorted(MANIFESTS.glob("worker-*")), ids=lambda path: path.name)
def test_the_engine_runs_on_the_interpreter_that_the_image_was_built_for(
    stages: dict[str, Stage], folder: Path
) -> None:
    text = (folder / "worker.toml").read_text()
    python = re.search(r'^python = "(.+)"$', text, flags=re.MULTILINE)

    assert python is not None
    assert f"{python[1]} -m venv --without-pip" in stages["worker"].last("RUN")
