"""Helpers of tests: a clock that tests move, servers under test. Only tests/ imports this."""

from __future__ import annotations

from libs.testing.clock import FakeClock
from libs.testing.eventually import eventually

__all__ = ["FakeClock", "eventually"]
