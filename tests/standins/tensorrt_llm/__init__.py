"""A strict stand-in for tensorrt_llm, for tests. See tests/standins/README.md."""

# ruff: noqa: TID252 - it is imported as tensorrt_llm, and known to mypy as a part of tests

from __future__ import annotations

from ._impl.layout import install

_surface = install()
__version__ = _surface.settings.version

if _surface.settings.banner:
    # The real one does that too: standard output is no place for a protocol of one's own.
    print(f"[TensorRT-LLM] TensorRT-LLM version: {__version__}")  # noqa: T201
