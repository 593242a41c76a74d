"""What the catalog says of the model version that a worker is to serve, before anything is loaded.

So a worker never serves other weights under the name of a version, whatever lies at its path.
"""

from __future__ import annotations

import structlog
from maas.catalog.v1 import model_pb2, model_service_pb2, model_service_pb2_grpc

from libs.clock import Clock
from libs.errors import DeadlineExceeded, MaasError, NotFound, Unavailable
from libs.process import StartError
from libs.rpc import Peer
from services.worker.config import WorkerSection

log = structlog.get_logger(__name__)

SERVICES = [model_service_pb2.DESCRIPTOR.services_by_name["ModelService"]]
METHOD = f"{SERVICES[0].full_name}/LookUpModelVersion"
TRY_FOR_S = 30.0
BACKOFF_MIN_S = 0.2
BACKOFF_MAX_S = 2.0
ANSWER_WITHIN_S = 5.0


async def with_digest(worker: WorkerSection, peer: Peer, clock: Clock) -> WorkerSection:
    """Returns the configuration with the digest that the catalog says, which may be none.

    Args:
        worker: the configuration.
        peer: the catalog; tried for TRY_FOR_S while it is away.
        clock: for the wait between two attempts.

    Raises:
        StartError: with what to do about it.
    """
    name = worker.model_version
    said = (await _look_up(name, peer, clock)).digest
    if not said:
        log.warning("the catalog has no digest", model_version=name)
        return worker
    if worker.engine == "sim":
        raise StartError(
            f"{name} has weights with digest {said} and the sim engine has none: set worker.engine"
            " to one that loads them, or worker.model_version to a version without a digest"
        )
    if worker.digest is not None and worker.digest != said:
        raise StartError(
            f"worker.digest is {worker.digest} and the catalog says {said} of {name}: correct the"
            " configuration, or create another version"
        )
    return worker.model_copy(update={"digest": said})


async def _look_up(name: str, peer: Peer, clock: Clock) -> model_pb2.ModelVersion:
    stub = model_service_pb2_grpc.ModelServiceStub(peer.channel)
    request = model_service_pb2.LookUpModelVersionRequest(name=name)
    give_up_s = clock.monotonic_s() + TRY_FOR_S
    backoff_s = BACKOFF_MIN_S
    while True:
        try:
            response = await peer.call(stub.LookUpModelVersion, request, timeout_s=ANSWER_WITHIN_S)
        except NotFound:
            raise StartError(
                f"the catalog has no {name}: create the version first (CreateModelVersion), or"
                " correct worker.model_version"
            ) from None
        except (Unavailable, DeadlineExceeded) as error:
            if clock.monotonic_s() + backoff_s > give_up_s:
                raise StartError(
                    f"the catalog at {peer.endpoint} did not answer within {TRY_FOR_S:g} s: {error}"
                ) from None
            log.warning("catalog away", endpoint=peer.endpoint, cause=str(error))
        except MaasError as error:
            raise StartError(
                f"the catalog at {peer.endpoint} does not say what {name} is: {error}; does"
                f' "{METHOD}" under its [identity.allow] name this worker\'s service?'
            ) from None
        else:
            return response.model_version
        await clock.sleep_s(backoff_s)
        backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)
