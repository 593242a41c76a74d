"""Asks grpc.health.v1 whether a server serves, without gRPC's library.

The process that forks must not have gRPC's threads in it, and a second process for each probe
would cost more than what it watches. One unary call over HTTP/2 is a few frames of fixed bytes.
Understands answers no further than it must: SERVING, or anything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct

from tools.local.place import HOST

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS, _GOAWAY = 0, 1, 4, 7
_ACK = 1
_END_STREAM, _END_HEADERS = 1, 4
_STREAM = 1
_HEAD_BYTES = 9
_FRAME_BYTES_MAX = 1 << 14
_EMPTY_REQUEST = b"\x00\x00\x00\x00\x00"
_SERVING = b"\x00\x00\x00\x00\x02\x08\x01"
"""A gRPC message of 2 bytes: field 1, status, is 1."""

_FIELDS = (
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/grpc.health.v1.Health/Check"),
    (":authority", "localhost"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
    ("grpc-timeout", "2S"),
)


def _literal(text: str) -> bytes:
    data = text.encode("ascii")
    return bytes([len(data)]) + data


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _call() -> bytes:
    """Everything that the client says, in one piece. RFC 9113; RFC 7541 section 6.2.2."""
    fields = b"".join(b"\x00" + _literal(name) + _literal(value) for name, value in _FIELDS)
    return (
        _PREFACE
        + _frame(_SETTINGS, 0, 0, b"")
        + _frame(_HEADERS, _END_HEADERS, _STREAM, fields)
        + _frame(_DATA, _END_STREAM, _STREAM, _EMPTY_REQUEST)
    )


async def _is_serving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    writer.write(_call())
    body = b""
    while True:
        head = await reader.readexactly(_HEAD_BYTES)
        length = int.from_bytes(head[:3], "big")
        kind, flags = head[3], head[4]
        if length > _FRAME_BYTES_MAX or kind == _GOAWAY:
            return False
        payload = await reader.readexactly(length)
        if kind == _SETTINGS and not flags & _ACK:
            writer.write(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _DATA:
            body += payload
        if kind in {_DATA, _HEADERS} and flags & _END_STREAM:
            return body == _SERVING


async def is_serving(port: int, *, timeout_s: float = 1.0) -> bool:
    """Whether the server on a port of this machine says SERVING."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(HOST, port)
            try:
                return await _is_serving(reader, writer)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return False
