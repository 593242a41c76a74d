"""Models, their versions, adapters, and what tenants may call. Pure: no gRPC, no SQL, no clock."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime

OUTPUT_TOKENS_DEFAULT = 512
"""Output tokens of a request, where neither it nor the offering says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What versions of a model have in common.

    Attributes:
        model_id: last part of its name.
        display_name: name for people.
        license: of the weights, an SPDX id where there is one.
        description: what it is and what it is for.
        create_time: when it was created.
    """

    model_id: str
    display_name: str
    license: str
    description: str
    create_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelVersion:
    """The bytes that workers load. Never changes.

    Attributes:
        model_id: its model.
        version_id: last part of its name.
        digest: "sha256:<hex>" of the weights; empty for the simulated engine.
        context_length: prompt and output together, tokens.
        prompt_overhead_tokens: most that the chat template adds to a prompt.
        message_overhead_tokens: most that the chat template adds for each message.
        create_time: when it was created.
    """

    model_id: str
    version_id: str
    digest: str
    context_length: int
    prompt_overhead_tokens: int
    message_overhead_tokens: int
    create_time: datetime

    @property
    def name(self) -> str:
        """Resource name."""
        return f"models/{self.model_id}/versions/{self.version_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offering:
    """A public name bound to one model version, with defaults.

    Attributes:
        offering_id: last part of its name; generation requests say it.
        display_name: name for people.
        model_id: model of the version that serves it.
        version_id: the version that serves it.
        default_max_output_tokens: where a request does not say; above zero.
        default_temperature: where a request does not say; None means 1.
        default_top_p: where a request does not say; None means off.
        default_top_k: where a request does not say; None means off.
        create_time: when it was created.
    """

    offering_id: str
    display_name: str
    model_id: str
    version_id: str
    default_max_output_tokens: int
    default_temperature: float | None
    default_top_p: float | None
    default_top_k: int | None
    create_time: datetime

    @property
    def version_name(self) -> str:
        """Resource name of the version that serves it."""
        return f"models/{self.model_id}/versions/{self.version_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundOffering:
    """An offering with what its version says.

    Attributes:
        offering: as it was created.
        version: the version that serves it.
        revision: grows with every change of any offering.
    """

    offering: Offering
    version: ModelVersion
    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA adapter for one model version. Never changes.

    Attributes:
        adapter_id: last part of its name.
        model_id: model of the version that it was made for.
        version_id: the version that it was made for.
        path: of the file, relative to the directory of adapters that workers are given.
        digest: "sha256:<hex>" of the file.
        project_id: the project that alone may use it; empty for all.
        create_time: when it was created.
    """

    adapter_id: str
    model_id: str
    version_id: str
    path: str
    digest: str
    project_id: str
    create_time: datetime

    @property
    def version_name(self) -> str:
        """Resource name of the version that it was made for."""
        return f"models/{self.model_id}/versions/{self.version_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAdapter:
    """An adapter as watchers hear of it.

    Attributes:
        adapter: as it was created.
        is_deleted: it may not be used any more.
        revision: grows with every change of any adapter.
    """

    adapter: Adapter
    is_deleted: bool
    revision: int


Created = Model | ModelVersion | Offering | Adapter
"""What Create calls make, and repeat without harm."""


def is_repeat(wanted: Created, stored: Created) -> bool:
    """Tells whether creating `wanted` again asks for what is stored, whenever that was made."""
    return dataclasses.replace(wanted, create_time=stored.create_time) == stored
