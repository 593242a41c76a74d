"""Configuration of the catalog."""

from __future__ import annotations

from libs.config import AuthSection, PostgresSection, ServiceConfig


class Config(ServiceConfig):
    """All of it.

    Attributes:
        postgres: where models and offerings are kept.
        auth: where the table of API keys comes from.
    """

    postgres: PostgresSection
    auth: AuthSection
