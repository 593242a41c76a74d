"""What few requests ask for, as JSON behind a SUBMIT frame.

Empty for a request that asks for none of it, so that plain requests carry no JSON.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Final

from services.worker.engine.base import Adapter, Constraint, ConstraintKind, EngineRequest

_SAMPLING_FIELDS: Final = ("min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
_REQUEST_FIELDS: Final = ("min_output_tokens", "prompt_logprobs", "stop_texts")


def write_extras(request: EngineRequest) -> bytes:
    """The bytes; none when everything has its default."""
    sampling = request.sampling
    extras: dict[str, object] = {}
    for source, names in ((sampling, _SAMPLING_FIELDS), (request, _REQUEST_FIELDS)):
        defaults = {field.name: field.default for field in dataclasses.fields(source)}
        for name in names:
            value = getattr(source, name)
            if value != defaults[name]:
                extras[name] = value
    if sampling.logit_bias:
        extras["logit_bias"] = sampling.logit_bias
    constraint, adapter = request.constraint, request.adapter
    if constraint is not None:
        extras["constraint"] = (constraint.kind.value, constraint.source, constraint.grammar)
    if adapter is not None:
        extras["adapter"] = (adapter.name, _text_of(adapter.path), adapter.digest)
    return json.dumps(extras).encode() if extras else b""


def read_extras(request: EngineRequest, data: bytes) -> EngineRequest:
    """The request with what the bytes say.

    Raises:
        ValueError: they are not what write_extras makes.
    """
    if not data:
        return request
    try:
        extras = json.loads(data)
    except ValueError:
        # The words of the JSON reader may hold parts of what a tenant wrote.
        raise ValueError("the extras of a submit frame are malformed") from None
    sampling = {name: extras[name] for name in _SAMPLING_FIELDS if name in extras}
    if "logit_bias" in extras:
        sampling["logit_bias"] = tuple(map(tuple, extras["logit_bias"]))
    fields = {name: extras[name] for name in _REQUEST_FIELDS if name in extras}
    if "stop_texts" in fields:
        fields["stop_texts"] = tuple(fields["stop_texts"])
    if "constraint" in extras:
        kind, source, grammar = extras["constraint"]
        fields["constraint"] = Constraint(kind=ConstraintKind(kind), source=source, grammar=grammar)
    if "adapter" in extras:
        name, path, digest = extras["adapter"]
        fields["adapter"] = Adapter(
            name=name, path=None if path is None else Path(path), digest=digest
        )
    return dataclasses.replace(
        request, sampling=dataclasses.replace(request.sampling, **sampling), **fields
    )


def _text_of(path: Path | None) -> str | None:
    return None if path is None else str(path)
