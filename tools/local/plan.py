"""What the supervisor tells the seed, and what the seed answers: two small files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Self

from tools.local import credential
from tools.local.model import ServedModel
from tools.local.options import Options
from tools.local.place import State


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What has to be in the suite once it is seeded.

    Attributes:
        port_base: of the suite.
        workers: how many must be ready.
        gateway_names: processes that must know the tenant's key.
        model_id: of models/{model}; also the wanted name of the offering.
        version_id: of models/{model}/versions/{version}.
        digest: of the weights; empty for the simulated engine.
        chat_template: of the weights; empty when there is none.
    """

    port_base: int
    workers: int
    gateway_names: list[str]
    model_id: str
    version_id: str
    digest: str
    chat_template: str

    @classmethod
    def of(cls, options: Options, model: ServedModel) -> Self:
        """The plan of one start."""
        return cls(
            port_base=options.ports.base,
            workers=options.workers,
            gateway_names=options.gateway_names,
            model_id=model.model_id,
            version_id=model.version_id,
            digest=model.digest,
            chat_template=model.chat_template,
        )

    @staticmethod
    def file(state: State) -> Path:
        """Where the supervisor leaves it."""
        return state.root / "seed.json"

    @classmethod
    def read(cls, state: State) -> Self:
        """Reads it."""
        return cls(**json.loads(cls.file(state).read_text()))

    def to_json(self) -> str:
        """Its text."""
        return json.dumps(dataclasses.asdict(self))


def answer(state: State, offering: str) -> None:
    """Leaves the id of the offering for the supervisor."""
    credential.write(_answer_file(state), f"{offering}\n")


def read_answer(state: State) -> str:
    """Id of the offering that was seeded."""
    return credential.read(_answer_file(state))


def _answer_file(state: State) -> Path:
    return state.root / "offering"
