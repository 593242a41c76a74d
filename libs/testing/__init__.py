"""Helpers of tests: a clock that tests move. Nothing outside tests/ imports this."""

from __future__ import annotations

from libs.testing.clock import FakeClock

__all__ = ["FakeClock"]
