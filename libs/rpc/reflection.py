"""Server reflection v1 and v1alpha: grpcurl of all ages.

The installed package serves v1alpha only. The messages of both are equal, so one servicer answers
for both; the descriptor of v1 is made from that of v1alpha, so that it can be described too.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

V1ALPHA = "grpc.reflection.v1alpha.ServerReflection"
V1 = "grpc.reflection.v1.ServerReflection"
_V1_FILE = "grpc/reflection/v1/reflection.proto"


def handlers(services: Sequence[str]) -> tuple[grpc.GenericRpcHandler, ...]:
    """Makes the handlers of both versions.

    Args:
        services: full names of what the server lists.
    """
    _add_v1_descriptor()
    method = grpc.stream_stream_rpc_method_handler(
        ReflectionServicer(services).ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return tuple(
        grpc.method_handlers_generic_handler(service, {"ServerReflectionInfo": method})
        for service in (V1, V1ALPHA)
    )


def _add_v1_descriptor() -> None:
    pool = descriptor_pool.Default()
    try:
        pool.FindFileByName(_V1_FILE)
    except KeyError:
        alpha = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
        text = str(alpha).replace("grpc.reflection.v1alpha", "grpc.reflection.v1")
        pool.Add(_parse(text.replace("v1alpha/", "v1/")))


def _parse(text: str) -> descriptor_pb2.FileDescriptorProto:
    file = text_format.Parse(text, descriptor_pb2.FileDescriptorProto())
    file.name = _V1_FILE
    return file
