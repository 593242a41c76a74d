"""Structured logs and metrics.

Logs are JSON lines on standard output, one event for each call, with fixed field names. They never
hold a prompt, an output or a secret. Metrics are declared once, in `metrics.py`.
"""

from __future__ import annotations

from libs.observability.logs import configure_logs
from libs.observability.metrics import serve_metrics

__all__ = ["configure_logs", "serve_metrics"]
