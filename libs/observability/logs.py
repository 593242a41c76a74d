"""Structured logs: JSON lines on standard output.

What cannot be written is dropped: a full disk must not fail what an event is about.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from typing import TextIO, cast

import structlog

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class _Lenient:
    """A text stream whose failures are nobody's."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes what can be written."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hands on what can be handed on; the stream keeps the rest for the next time."""
        with contextlib.suppress(OSError):
            self._stream.flush()


def configure_logs(service: str, level: str) -> None:
    """Sets up structlog for the process. Call once, before the first event."""

    def add_service(
        logger: object,  # noqa: ARG001 - signature of a processor
        name: str,  # noqa: ARG001 - signature of a processor
        event: structlog.typing.EventDict,
    ) -> structlog.typing.EventDict:
        event["service"] = service
        return event

    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        add_service,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    encoder = json.JSONEncoder(default=repr)

    def write(event: structlog.typing.EventDict, **_: object) -> str:
        # Made once: json.dumps with a default makes an encoder for each event.
        return encoder.encode(event)

    render = structlog.processors.JSONRenderer(serializer=write)
    structlog.configure(
        processors=[*processors, render],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=cast("TextIO", _Lenient(sys.stdout))),
        cache_logger_on_first_use=True,
    )
    _take_over_standard_logging([*processors, render])


def _take_over_standard_logging(processors: list[structlog.typing.Processor]) -> None:
    """Gives what libraries log the same form."""
    handler = logging.StreamHandler(cast("TextIO", _Lenient(sys.stdout)))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *processors]
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
