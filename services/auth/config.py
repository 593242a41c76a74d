"""Configuration of auth."""

from __future__ import annotations

from pathlib import Path

from libs.config import PostgresSection, Section, ServiceConfig


class AuthOwnSection(Section):
    """Auth itself.

    Attributes:
        bootstrap_admin_key_file: file with an administrator's key, stored at a start that finds
            no key at all; absent when there is nothing to store.
    """

    bootstrap_admin_key_file: Path | None = None


class Config(ServiceConfig):
    """All of it.

    Attributes:
        postgres: where organizations, projects and keys are kept.
        auth: auth itself.
    """

    postgres: PostgresSection
    auth: AuthOwnSection = AuthOwnSection()
