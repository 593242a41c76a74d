"""gRPC, in one way for the whole suite.

Servers: `Server` puts the same stack around every method: request id, errors, deadline,
authentication, authorisation, validation, log and metrics. Handlers raise `libs.errors` and return
messages; they never see a status code.

Clients: `Peer` calls another service, with its token, a deadline and the same errors back;
`follow` keeps a watch alive.
"""

from __future__ import annotations

from libs.rpc.call import Call, current_call
from libs.rpc.client import Peer
from libs.rpc.server import Server
from libs.rpc.watch import Hub, follow

__all__ = ["Call", "Hub", "Peer", "Server", "current_call", "follow"]
