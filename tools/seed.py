"""Writes the first data of a local suite through its public methods, as an operator would.

A customer `dev` with a project, an account with credit, an API key; a model, its version, an
offering of it and a price. Ids are fixed or derive from the model, so a second run changes nothing.

    python -m tools.seed --state .maas       after the supervisor has written its plan there
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

from google.protobuf.message import Message
from maas.auth.v1 import api_key_service_pb2 as api_keys
from maas.auth.v1 import tenancy_pb2
from maas.auth.v1 import tenancy_service_pb2 as tenancy
from maas.auth.v1.api_key_service_pb2_grpc import ApiKeyServiceStub
from maas.auth.v1.tenancy_service_pb2_grpc import TenancyServiceStub
from maas.billing.v1 import account_service_pb2 as accounts
from maas.billing.v1 import ledger_pb2
from maas.billing.v1 import price_service_pb2 as prices
from maas.billing.v1.account_service_pb2_grpc import AccountServiceStub
from maas.billing.v1.price_service_pb2_grpc import PriceServiceStub
from maas.catalog.v1 import model_pb2
from maas.catalog.v1 import model_service_pb2 as models
from maas.catalog.v1 import offering_service_pb2 as offerings
from maas.catalog.v1.model_service_pb2_grpc import ModelServiceStub
from maas.catalog.v1.offering_service_pb2_grpc import OfferingServiceStub
from maas.common.v1 import money_pb2
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_service_pb2 as generations
from maas.inference.v1.generation_service_pb2_grpc import GenerationServiceStub
from maas.scheduler.v1 import worker_pb2
from maas.scheduler.v1 import worker_service_pb2 as workers
from maas.scheduler.v1.worker_service_pb2_grpc import WorkerServiceStub

from libs import errors, rpc
from libs.ids import last_part
from tools.local import credential, overhead
from tools.local.model import ID_LENGTH_MAX
from tools.local.options import state_argument
from tools.local.place import Ports, State, address
from tools.local.plan import Plan, answer

ORGANIZATION = "organizations/dev"
PROJECT = "projects/dev"
ACCOUNT = "accounts/dev"
GRANT_NANOS = 100_000_000_000
GRANT_REQUEST_ID = "seed-grant"
INPUT_NANOS_PER_MILLION = 150_000_000
CACHED_INPUT_NANOS_PER_MILLION = 75_000_000
OUTPUT_NANOS_PER_MILLION = 600_000_000
PATIENCE_S = 60.0
"""How long services may take to find each other, and workers to register."""
KEY_PATIENCE_S = 10.0
"""How long a new key may take to become known everywhere."""
_POLL_S = 0.1
_SUFFIX_LENGTH = 6
_MODULES = {
    "auth": (tenancy, api_keys),
    "catalog": (models, offerings),
    "billing": (accounts, prices),
    "scheduler": (workers,),
    "gateway": (generations,),
}

Response = TypeVar("Response", bound=Message)


class SeedError(Exception):
    """The suite is not as the seed needs it; the text says what to do."""


def connect(ports: Ports, process: str, key: str) -> rpc.Peer:
    """Connects to a process, "auth" or "gateway-2", with an API key."""
    modules = _MODULES[process.partition("-")[0]]
    found = [module.DESCRIPTOR.services_by_name.values() for module in modules]
    known = [item for items in found for item in items]
    return rpc.Peer(address(ports.of_process(process)), key, known)


async def patiently(call: Callable[[], Awaitable[Response]]) -> Response:
    """Repeats a call while services are still finding each other.

    A key that was just made is unknown to a service until its table has it. All calls of the seed
    may be repeated, but the one that makes a key.

    Raises:
        MaasError: the last refusal.
    """
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    while True:
        try:
            return await call()
        except (errors.Unavailable, errors.Unauthenticated) as error:
            is_unknown = isinstance(error, errors.Unauthenticated)
            if loop.time() - started_s > (KEY_PATIENCE_S if is_unknown else PATIENCE_S):
                raise
        await asyncio.sleep(_POLL_S)


async def create(call: Callable[[], Awaitable[Response]]) -> bool:
    """Creates something, or leaves it as it is; False when it was there with other content."""
    try:
        await patiently(call)
    except errors.AlreadyExists:
        return False
    return True


async def seed(state: State, plan: Plan) -> None:
    """Writes everything; leaves the offering and the tenant's key in the state directory."""
    ports = Ports(plan.port_base)
    admin = credential.read(credential.admin_key_file(state))
    async with (
        connect(ports, "auth", admin) as auth,
        connect(ports, "catalog", admin) as catalog,
        connect(ports, "billing", admin) as billing,
        connect(ports, "scheduler", admin) as scheduler,
    ):
        await create_customer(auth, billing)
        await keep_key(state, ports, auth)
        info = await await_workers(scheduler, plan)
        offering = await create_offering(catalog, plan, info)
        await create_price(billing, offering)
    for name in plan.gateway_names:
        await await_gateway(ports, name, credential.read(credential.tenant_key_file(state)))
    answer(state, last_part(offering))


async def create_customer(auth: rpc.Peer, billing: rpc.Peer) -> None:
    """Creates organization, project and account, and gives the credit, once."""
    tenants = TenancyServiceStub(auth.channel)
    organization = tenancy.CreateOrganizationRequest(
        organization_id=last_part(ORGANIZATION), display_name="Development"
    )
    await create(lambda: auth.call(tenants.CreateOrganization, organization))
    project = tenancy.CreateProjectRequest(
        project_id=last_part(PROJECT), organization=ORGANIZATION, display_name="Development"
    )
    await create(lambda: auth.call(tenants.CreateProject, project))
    ledger = AccountServiceStub(billing.channel)
    account = accounts.CreateAccountRequest(
        account_id=last_part(ACCOUNT), display_name="Development", currency_code="USD"
    )
    await create(lambda: billing.call(ledger.CreateAccount, account))
    grant = accounts.PostEntryRequest(
        account=ACCOUNT,
        amount=usd(GRANT_NANOS),
        kind=ledger_pb2.ENTRY_KIND_GRANT,
        request_id=GRANT_REQUEST_ID,
        description="Credit to try things with",
    )
    await patiently(lambda: billing.call(ledger.PostEntry, grant))


def usd(nanos: int) -> money_pb2.Money:
    """An amount in US dollars."""
    return money_pb2.Money(currency_code="USD", nanos=nanos)


async def keep_key(state: State, ports: Ports, auth: rpc.Peer) -> None:
    """Makes a tenant's key unless the one of an earlier start is still accepted."""
    path = credential.tenant_key_file(state)
    if credential.read(path) and await is_accepted(ports, credential.read(path)):
        return
    request = api_keys.CreateApiKeyRequest(
        project=PROJECT, display_name="Development", role=tenancy_pb2.ROLE_TENANT
    )
    made = await auth.call(ApiKeyServiceStub(auth.channel).CreateApiKey, request)
    credential.write(path, f"{made.secret}\n")


async def is_accepted(ports: Ports, key: str) -> bool:
    """Whether auth knows a key and it is our project's."""
    async with connect(ports, "auth", key) as peer:
        keys = ApiKeyServiceStub(peer.channel)
        try:
            info = await peer.call(keys.GetCallerInfo, api_keys.GetCallerInfoRequest())
        except (errors.Unauthenticated, errors.PermissionDenied):
            return False
    return info.api_key.project == PROJECT


async def await_workers(scheduler: rpc.Peer, plan: Plan) -> engine_pb2.EngineInfo:
    """Waits until all workers are ready; returns what they are.

    Raises:
        SeedError: they did not register in time.
    """
    version = version_name(plan)
    stub = WorkerServiceStub(scheduler.channel)
    request = workers.ListWorkersRequest(page_size=1000)
    ready = 0
    for _ in range(int(PATIENCE_S / _POLL_S)):
        listed = await patiently(lambda: scheduler.call(stub.ListWorkers, request))
        found = [
            worker.info
            for worker in listed.workers
            if worker.state == worker_pb2.WORKER_STATE_READY
            and version in worker.info.model_versions
        ]
        ready = len(found)
        if ready >= plan.workers:
            return found[0]
        await asyncio.sleep(_POLL_S)
    raise SeedError(f"only {ready} of {plan.workers} workers registered for {version}")


def version_name(plan: Plan) -> str:
    """Resource name of the version that is served."""
    return f"models/{plan.model_id}/versions/{plan.version_id}"


async def create_offering(catalog: rpc.Peer, plan: Plan, info: engine_pb2.EngineInfo) -> str:
    """Creates model, version and offering; returns the name of the offering.

    The offering has the model's name, unless that stands for another version already: then a part
    of the digest is added.
    """
    registry = ModelServiceStub(catalog.channel)
    model = models.CreateModelRequest(model_id=plan.model_id, display_name=plan.model_id)
    await create(lambda: catalog.call(registry.CreateModel, model))
    prompt, message = overhead.bounds(plan.chat_template)
    version = models.CreateModelVersionRequest(
        parent=f"models/{plan.model_id}",
        model_version_id=plan.version_id,
        model_version=model_pb2.ModelVersion(
            digest=plan.digest,
            context_length=info.context_length,
            prompt_overhead_tokens=prompt,
            message_overhead_tokens=message,
        ),
    )
    await create(lambda: catalog.call(registry.CreateModelVersion, version))
    plain = plan.model_id
    if await offers(catalog, plain, plan):
        return f"offerings/{plain}"
    own = f"{plain[: ID_LENGTH_MAX - 1 - _SUFFIX_LENGTH]}-{plan.version_id[:_SUFFIX_LENGTH]}"
    if await offers(catalog, own, plan):
        return f"offerings/{own}"
    raise SeedError(f"offerings {plain} and {own} both stand for other versions: make clean")


async def offers(catalog: rpc.Peer, offering_id: str, plan: Plan) -> bool:
    """Creates an offering of our version; False when it stands for another one."""
    stub = OfferingServiceStub(catalog.channel)
    request = offerings.CreateOfferingRequest(
        offering_id=offering_id,
        offering=model_pb2.Offering(
            display_name=plan.model_id,
            model_version=version_name(plan),
            default_max_output_tokens=512,
            # What most models are told stories with; a request may say otherwise.
            default_temperature=0.7,
            default_top_p=0.95,
        ),
    )
    if await create(lambda: catalog.call(stub.CreateOffering, request)):
        return True
    reading = offerings.GetOfferingRequest(name=f"offerings/{offering_id}")
    found = await patiently(lambda: catalog.call(stub.GetOffering, reading))
    return found.offering.model_version == version_name(plan)


async def create_price(billing: rpc.Peer, offering: str) -> None:
    """Prices the offering, once; a price of an earlier start stays as it is."""
    stub = PriceServiceStub(billing.channel)
    request = prices.CreatePriceRequest(
        price_id=last_part(offering),
        price=ledger_pb2.Price(
            offering=offering,
            input_price_per_million=usd(INPUT_NANOS_PER_MILLION),
            cached_input_price_per_million=usd(CACHED_INPUT_NANOS_PER_MILLION),
            output_price_per_million=usd(OUTPUT_NANOS_PER_MILLION),
        ),
    )
    await create(lambda: billing.call(stub.CreatePrice, request))


async def await_gateway(ports: Ports, name: str, key: str) -> None:
    """Waits until a gateway accepts the tenant's key: it has heard of everything before it."""
    async with connect(ports, name, key) as gateway:
        stub = GenerationServiceStub(gateway.channel)
        request = generations.CancelGenerationRequest(generation_id="none")
        try:
            await patiently(lambda: gateway.call(stub.CancelGeneration, request))
        except (errors.NotFound, errors.InvalidArgument):
            return


def main() -> int:
    """Seeds the suite; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    state_argument(parser)
    state = State(parser.parse_args().state)
    try:
        asyncio.run(seed(state, Plan.read(state)))
    except errors.Unauthenticated:
        sys.stderr.write(
            "the administrator's key is not that of the database: make clean removes both\n"
        )
        return 1
    except (errors.MaasError, SeedError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
