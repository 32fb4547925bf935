"""A request's body, read within a size and a time, as JSON."""

from __future__ import annotations

import asyncio

import orjson
from starlette.requests import ClientDisconnect, Request

from common.errors import InvalidRequest, PayloadTooLarge, RequestCancelled

_BODY_TIMEOUT_S = 30.0
# What is too large is still read, up to here, and thrown away: a client that is cut off while it sends may not see the answer.
_DISCARDED_BYTES = 16 * 1024 * 1024


async def read_json(request: Request, *, limit_bytes: int) -> object:
    """Raises PayloadTooLarge, InvalidRequest, or RequestCancelled if the client went away."""
    body = await _read(request, limit_bytes)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise InvalidRequest(f"bodies are read as they are, not as {encoding[:40]!r}", param="content-encoding")
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}") from None
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None


async def _read(request: Request, limit_bytes: int) -> bytearray:
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit_bytes + _DISCARDED_BYTES:
        raise _too_large(limit_bytes)
    body = bytearray()
    size_bytes = 0
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for piece in request.stream():
                size_bytes += len(piece)
                if size_bytes > limit_bytes + _DISCARDED_BYTES:
                    raise _too_large(limit_bytes)
                if size_bytes <= limit_bytes:
                    body += piece
    except TimeoutError:
        raise InvalidRequest(f"the body did not arrive within {_BODY_TIMEOUT_S:g} s") from None
    except ClientDisconnect:
        raise RequestCancelled("the client went away") from None
    if size_bytes > limit_bytes:
        raise _too_large(limit_bytes)
    return body


def _too_large(limit_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than {limit_bytes} bytes")
