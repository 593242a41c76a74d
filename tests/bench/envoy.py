"""Envoy in front of the floor: HTTP/2 on both sides, one route, nothing else."""

from __future__ import annotations

import json
from typing import Any

_TYPE = "type.googleapis.com/envoy.extensions."
_CONNECTIONS = f"{_TYPE}filters.network.http_connection_manager.v3.HttpConnectionManager"
_ROUTER = f"{_TYPE}filters.http.router.v3.Router"
_PROTOCOL = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
REQUESTS_MAX = 100_000
"""Above any load here; Envoy's own bound is 1024 requests to an upstream."""


def config(port: int, upstream_port: int) -> str:
    """Writes Envoy's configuration: no admin page, everything on the loopback interface."""
    return json.dumps(
        {
            "static_resources": {
                "listeners": [{"address": _loopback(port), "filter_chains": [_chain()]}],
                "clusters": [_cluster(upstream_port)],
            }
        }
    )


def _loopback(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _chain() -> dict[str, Any]:
    # Without a limit of its own time: a stream may last longer than Envoy's 15 s.
    route = {"match": {"prefix": "/"}, "route": {"cluster": "floor", "timeout": "0s"}}
    connections = {
        "@type": _CONNECTIONS,
        "stat_prefix": "ingress",
        "codec_type": "HTTP2",
        "route_config": {
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}],
        },
        "http_filters": [
            {"name": "envoy.filters.http.router", "typed_config": {"@type": _ROUTER}},
        ],
    }
    return {
        "filters": [
            {"name": "envoy.filters.network.http_connection_manager", "typed_config": connections}
        ]
    }


def _cluster(port: int) -> dict[str, Any]:
    return {
        "name": "floor",
        "type": "STATIC",
        "typed_extension_protocol_options": {
            _PROTOCOL: {
                "@type": f"type.googleapis.com/{_PROTOCOL}",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
        "load_assignment": {
            "cluster_name": "floor",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _loopback(port)}}]}],
        },
        "circuit_breakers": {
            "thresholds": [{"max_requests": REQUESTS_MAX, "max_pending_requests": REQUESTS_MAX}]
        },
    }
