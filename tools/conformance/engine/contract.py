"""All checks of the engine contract, those that end the engine last: starting one takes time."""

from __future__ import annotations

from typing import Final

from tools.conformance.engine.adapters import LORA
from tools.conformance.engine.cache import CACHE
from tools.conformance.engine.check import Check
from tools.conformance.engine.constraints import CONSTRAINTS
from tools.conformance.engine.embedding import EMBEDDING
from tools.conformance.engine.ending import ENDING
from tools.conformance.engine.kv_events import EVENTS
from tools.conformance.engine.leaving import LEAVING
from tools.conformance.engine.life import LIFE
from tools.conformance.engine.sampling import SAMPLING
from tools.conformance.engine.scores import SCORES
from tools.conformance.engine.stops import STOPS
from tools.conformance.engine.texts import TEXTS

CHECKS: Final[tuple[Check, ...]] = (
    *LIFE,
    *STOPS,
    *LEAVING,
    *SAMPLING,
    *SCORES,
    *CACHE,
    *EVENTS,
    *LORA,
    *EMBEDDING,
    *CONSTRAINTS,
    *TEXTS,
    *ENDING,
)
