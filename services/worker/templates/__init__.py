"""Chat templates of our own, for models that bring none or one without tools."""

from __future__ import annotations

from importlib import resources


def load(name: str) -> str:
    """Returns the Jinja2 source of a template, e.g. of "chatml_tools".

    Raises:
        FileNotFoundError: there is none of this name.
    """
    return resources.files(__name__).joinpath(f"{name}.jinja").read_text(encoding="utf-8")
