"""What every service's main has in common: metrics, the key table, a peer per neighbour."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from libs import observability
from libs.auth import KeyTable
from libs.clock import SystemClock
from libs.config import AuthSection, ServiceConfig, read_secret
from libs.process import Background
from libs.rpc.client import Peer
from libs.rpc.key_watch import SERVICES, follow_keys


@asynccontextmanager
async def key_table(config: ServiceConfig, auth: AuthSection) -> AsyncIterator[KeyTable]:
    """Gives a table of API keys that the auth service keeps fresh in the background."""
    table = KeyTable()
    credential = read_secret(config.identity.token_file)
    async with (
        Peer(auth.endpoint, credential, SERVICES) as peer,
        Background(_end_process) as background,
    ):
        background.start(follow_keys(peer, table, SystemClock()), name="follow keys")
        yield table


def _end_process(_: BaseException) -> None:
    """Ends the process as SIGTERM would: without fresh keys it could only refuse everybody."""
    os.kill(os.getpid(), signal.SIGTERM)


def start_metrics(config: ServiceConfig) -> None:
    """Serves the metrics page of the process."""
    observability.serve_metrics(config.server.metrics_listen)
