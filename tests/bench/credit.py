"""Gives the local suite's account more credit than any load can hold.

python -m tests.bench.credit BILLING ADMIN_KEY
"""

from __future__ import annotations

import asyncio
import sys

from maas.billing.v1 import account_service_pb2 as pb
from maas.billing.v1 import account_service_pb2_grpc, ledger_pb2
from maas.common.v1 import money_pb2

from libs.rpc import Peer

ACCOUNT = "accounts/dev"
NANOS = 10**13
"""10,000 US dollars: a thousand streams of a million tokens hold 600."""
TIMEOUT_S = 10.0


async def main(billing: str, admin_key: str) -> None:
    """Posts the grant."""
    services = pb.DESCRIPTOR.services_by_name.values()
    async with asyncio.timeout(TIMEOUT_S), Peer(billing, admin_key, list(services)) as peer:
        request = pb.PostEntryRequest(
            account=ACCOUNT,
            amount=money_pb2.Money(currency_code="USD", nanos=NANOS),
            kind=ledger_pb2.ENTRY_KIND_GRANT,
            request_id="bench-grant",
            description="Credit to measure with",
        )
        await peer.call(
            account_service_pb2_grpc.AccountServiceStub(peer.channel).PostEntry, request
        )


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
