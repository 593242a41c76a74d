"""Requests that several features begin with."""

from __future__ import annotations

import json
from collections.abc import Mapping

import jsonschema
from maas.inference.v1 import constraint_pb2, embedding_service_pb2, generation_pb2, tools_pb2

from tools.conformance.client import Tenant

SEED = 20_260_404
PROMPT = "Once upon a time there was a small robot"
TOKENS = 48
CONSTRAINED_TOKENS = 400

Spec = generation_pb2.GenerationSpec
Request = Spec | embedding_service_pb2.EmbedRequest


def matches(text: str, schema: Mapping[str, object]) -> bool:
    """Whether a text is JSON that matches a schema. Says nothing of the text: it is output."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except (jsonschema.ValidationError, json.JSONDecodeError, RecursionError):
        return False
    return True


def begin_alike(one: generation_pb2.Generation, other: generation_pb2.Generation) -> bool:
    """Whether two outputs have the same tokens, up to the end of the shorter one.

    A simulated model may end an output by chance, whatever its likeliest token is.
    """
    ids, others = one.outputs[0].token_ids, other.outputs[0].token_ids
    shared = min(len(ids), len(others))
    return shared > 0 and ids[:shared] == others[:shared]


def greedy(tenant: Tenant, tokens: int = TOKENS) -> Spec:
    """A request for the likeliest tokens, that runs to its length where it may."""
    return Spec(
        model=tenant.model,
        text=PROMPT,
        sampling=generation_pb2.SamplingOptions(temperature=0, seed=SEED),
        stop=generation_pb2.StopOptions(max_output_tokens=tokens),
        output=generation_pb2.OutputOptions(return_token_ids=True),
    )


def constrained(tenant: Tenant, constraint: constraint_pb2.OutputConstraint) -> Spec:
    """A request whose output is constrained and has room to end."""
    spec = greedy(tenant, CONSTRAINED_TOKENS)
    spec.constraint.CopyFrom(constraint)
    return spec


def tool(name: str, schema: Mapping[str, object], *, strict: bool) -> tools_pb2.Tool:
    """A function."""
    return tools_pb2.Tool(
        name=name,
        description=f"Gets the {name.rpartition('_')[2]} of a city.",
        parameters_json_schema=json.dumps(schema),
        strict=strict,
    )


CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome", "Oslo"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
"""Arguments of the tools that are asked for here."""


def user(text: str) -> generation_pb2.ChatMessage:
    """A message of a person."""
    return generation_pb2.ChatMessage(
        role=generation_pb2.ROLE_USER, parts=[generation_pb2.ContentPart(text=text)]
    )
