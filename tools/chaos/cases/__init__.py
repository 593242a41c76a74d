"""Systematic fault cases: one thing goes wrong at a time, then every token is audited."""
