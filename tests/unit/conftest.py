"""Hypothesis in unit tests: the same examples in every run, and no clock that may fail a test."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("unit", max_examples=50, derandomize=True, deadline=None)
hypothesis.settings.load_profile("unit")
