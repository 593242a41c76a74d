"""Which model a local suite serves: its ids, and what has to be known of its file.

Ids derive from the file's name and content, so another file is another model and the same file is
the same one at every start.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from services.worker.engine.base import EngineStartError
from services.worker.engine.gguf import NotGgufError, describe
from services.worker.engine.sim_tokenizer import CHAT_TEMPLATE
from tools.local import credential
from tools.local.place import OWN_MODEL, OWN_TEMPLATE

ID_LENGTH_MAX = 63
VERSION_LENGTH = 12
SIM = "sim"
_TEMPLATE_KEY = "tokenizer.chat_template"


class ModelError(Exception):
    """The file cannot be served; the text says why."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What the worker serves.

    Attributes:
        model_id: of models/{model}; also of the offering.
        version_id: of models/{model}/versions/{version}.
        digest: "sha256:" and 64 hexadecimal digits; empty for the simulated engine.
        file: the weights, a file or a directory; None for the simulated engine.
        chat_template: Jinja text; empty when the file has none.
        template_file: where it stands, when it is not that of the weights.
    """

    model_id: str
    version_id: str
    digest: str
    file: Path | None
    chat_template: str
    template_file: Path | None = None

    @property
    def version_name(self) -> str:
        """Resource name of the version."""
        return f"models/{self.model_id}/versions/{self.version_id}"


SIMULATED = ServedModel(
    model_id=SIM, version_id="1", digest="", file=None, chat_template=CHAT_TEMPLATE
)


def model_id_of(path: Path) -> str:
    """Makes an id of a file's name.

    Raises:
        ModelError: no letter or digit is in it.
    """
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("._-")[:ID_LENGTH_MAX]
    if not text:
        raise ModelError(f"{path.name}: no model id can be made of this name; rename the file")
    return text


def read_model(path: Path, known: Path) -> ServedModel:
    """Describes a GGUF file.

    Args:
        path: the file.
        known: where digests are kept between starts; reading a large file takes its time.

    Raises:
        ModelError: it is missing or is no GGUF file.
    """

    def read() -> dict[str, str]:
        found_template = _read_template(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"digest": digest, "template": found_template}

    facts = _facts_of(path, [path], known, read)
    digest = facts["digest"]
    if path == OWN_MODEL:
        # Says the same where nobody asks for tools, which the file's own does not know.
        template, template_file = OWN_TEMPLATE.read_text(encoding="utf-8"), OWN_TEMPLATE
    else:
        template, template_file = facts["template"], None
    return ServedModel(
        model_id=model_id_of(path),
        version_id=digest[:VERSION_LENGTH],
        digest=f"sha256:{digest}",
        file=path,
        chat_template=template,
        template_file=template_file,
    )


def read_directory(path: Path, known: Path) -> ServedModel:
    """Describes the directory of a Hugging Face model.

    Args:
        path: the directory.
        known: where digests are kept between starts; reading large files takes its time.

    Raises:
        ModelError: it cannot be served.
    """
    # Here, because what they need is not installed where no such model is served.
    from services.worker.engine.hf_digest import digest_of  # noqa: PLC0415
    from services.worker.engine.hf_tokenizer import HfTokenizer  # noqa: PLC0415

    def read() -> dict[str, str]:
        digest = digest_of(path, lambda _: None)
        return {"digest": digest, "template": HfTokenizer(path).chat_template}

    try:
        facts = _facts_of(path, sorted(path.iterdir()), known, read)
    except (EngineStartError, OSError) as error:
        raise ModelError(str(error)) from error
    return ServedModel(
        model_id=model_id_of(path),
        version_id=facts["digest"].removeprefix("sha256:")[:VERSION_LENGTH],
        digest=facts["digest"],
        file=path,
        chat_template=facts["template"],
    )


def _facts_of(
    path: Path, files: Sequence[Path], known: Path, read: Callable[[], dict[str, str]]
) -> dict[str, str]:
    """What is known of a model, from an earlier start where its files are the same."""
    try:
        found = [file.stat() for file in files]
        stamps = " ".join(f"{one.st_size} {one.st_mtime_ns} {one.st_ino}" for one in found)
        key = f"{path} {stamps}"
        facts = _read_known(known)
        if key not in facts:
            facts = {key: read()}
            credential.write(known, json.dumps(facts))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    return facts[key]


def _read_known(known: Path) -> dict[str, dict[str, str]]:
    try:
        facts: dict[str, dict[str, str]] = json.loads(known.read_text())
    except (OSError, ValueError):
        return {}
    return facts


def _read_template(path: Path) -> str:
    """Finds the chat template in a GGUF file's metadata; empty when there is none."""
    try:
        template = describe(path).fields.get(_TEMPLATE_KEY, "")
    except NotGgufError as error:
        raise ModelError(f"{path}: is no GGUF file that can be read: {error}") from error
    return template if isinstance(template, str) else ""
