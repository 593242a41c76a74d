"""The time of a request with one output token, without limits and with them: `--only admission`.

Through the whole suite, as a client sees it, by independent callers. Both kinds take turns.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Mapping
from pathlib import Path

from maas.billing.v1 import limit_service_pb2 as pb
from maas.billing.v1 import limit_service_pb2_grpc
from maas.common.v1 import money_pb2

from libs.rpc import Peer
from tests.bench.load import Load
from tests.bench.load import run as run_load
from tests.bench.measure import quantile
from tests.bench.money_rig import ENOUGH
from tests.bench.report import table
from tests.bench.targets import suite

PER_S = 50.0
REQUESTS = 400
CAPACITY = 256
SEED = 17
SHARES = (0.5, 0.99)
KNOWN_S = 2.0
"""Until a gateway knows of a limit, and what it had from before has been given back."""
PROJECT = "projects/dev"
SERVICES = [pb.DESCRIPTOR.services_by_name["LimitService"]]


def outside(repeats: int, *, is_quick: bool) -> None:
    """Time to the first and only token, with and without limits."""
    requests = 40 if is_quick else REQUESTS
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with suite(["--engine=sim", f"--capacity={CAPACITY}", "--flat-out"]) as whole:
        assert whole.state is not None
        environment = _environment(whole.state)
        for repeat in range(repeats):
            load = Load(
                kind="arrivals",
                count=0,
                tokens=1,
                requests=requests,
                per_s=PER_S,
                seed=SEED + repeat,
            )
            for is_limited in (False, True):
                if is_limited:
                    asyncio.run(_limit(environment))
                seconds[is_limited] += run_load(whole, load).result.first_token_s
                if is_limited:
                    asyncio.run(_lift(environment))
    rows = [
        [name, *(f"{quantile(seconds[is_limited], share) * 1e3:.2f} ms" for share in SHARES)]
        for name, is_limited in (("without limits", False), ("with limits", True))
    ]
    table(
        f"One token through the suite, {PER_S:g} requests/s, {repeats * requests:,} of each",
        ["", *(f"p{share * 100:g}" for share in SHARES)],
        rows,
    )


def _environment(state: Path) -> Mapping[str, str]:
    """Reads what `make run` has written down for its users."""
    found = {}
    for line in (state / "dev.env").read_text().splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        found[name] = shlex.split(value)[0]
    return found


def _limits(account: str) -> dict[str, pb.Limit]:
    """Limits of every kind that the load does not reach."""
    rate = pb.RateLimit(
        requests_per_minute=ENOUGH,
        input_tokens_per_minute=ENOUGH,
        output_tokens_per_minute=ENOUGH,
        concurrent_generations=ENOUGH,
    )
    spend = pb.SpendLimit(
        amount=money_pb2.Money(currency_code="USD", nanos=10**15),
        window=pb.SPEND_WINDOW_DAY,
    )
    return {
        "account": pb.Limit(account=account, scope=account, rate=rate),
        "project": pb.Limit(account=account, scope=PROJECT, rate=rate),
        "spend": pb.Limit(account=account, scope=account, spend=spend),
    }


async def _limit(environment: Mapping[str, str]) -> None:
    """Gives the account limits, and waits until gateways know them."""
    limits = _limits(environment["MAAS_ACCOUNT"])
    async with _billing(environment) as peer:
        stub = limit_service_pb2_grpc.LimitServiceStub(peer.channel)
        for name, limit in limits.items():
            request = pb.CreateLimitRequest(limit_id=f"bench-{name}", limit=limit)
            await peer.call(stub.CreateLimit, request)
    await asyncio.sleep(KNOWN_S)


async def _lift(environment: Mapping[str, str]) -> None:
    """Takes them away, and waits until gateways know that."""
    async with _billing(environment) as peer:
        stub = limit_service_pb2_grpc.LimitServiceStub(peer.channel)
        for name in _limits(environment["MAAS_ACCOUNT"]):
            await peer.call(stub.DeleteLimit, pb.DeleteLimitRequest(name=f"limits/bench-{name}"))
    await asyncio.sleep(KNOWN_S)


def _billing(environment: Mapping[str, str]) -> Peer:
    return Peer(environment["MAAS_BILLING"], environment["MAAS_ADMIN_KEY"], SERVICES)
