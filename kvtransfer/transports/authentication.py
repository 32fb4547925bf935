"""How the two ends of a data link prove to each other who they are, before the first frame.

    prefill worker                                                decode worker
    HELLO(challenge p, own name, wanted name, layout)  ------->
                                                       <-------   CHALLENGE(challenge d)
    PROOF = HMAC(secret, "prefill" | hello | challenge)  ----->
                                                       <-------   VERDICT(code, pool shape, HMAC(secret, "decode" | all of it))

The prefill worker proves itself first, so that an anonymous peer learns nothing, not even whether it found the worker it asked
for. Both proofs cover both names with their incarnations and both challenges: a recorded conversation is of no use, nor is one
with an earlier life of either worker. Once open the link is not encrypted and its frames carry no MAC; off one host, the
network between the workers must be trusted.

Messages are made and checked here without I/O; `authenticate_as_prefill` and `authenticate_as_decode` send them over a socket.
"""

from __future__ import annotations

import asyncio
import enum
import hmac
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from common.errors import HandshakeRefused, TransferBroken
from kvtransfer.transports.base import LinkCredentials, PeerName

LINK_VERSION = 3
AUTHENTICATION_TIMEOUT_S = 5.0
MAX_NAME_BYTES = 256
CHALLENGE_BYTES = 32
PROOF_BYTES = 32
_HELLO = struct.Struct("<4sHHHQQ32s32s")  # magic, version, two name lengths, two incarnations, layout, challenge; names follow
_HELLO_MAGIC = b"PDLH"
_VERDICT = struct.Struct("<BQQ32s")
_PREFILL_TAG, _DECODE_TAG = b"pdserve-link-prefill-v1", b"pdserve-link-decode-v1"


class Verdict(enum.IntEnum):
    WELCOME = 0
    NOT_AUTHENTIC = 1
    WRONG_VERSION = 2
    WRONG_WORKER = 3
    WRONG_INCARNATION = 4
    WRONG_LAYOUT = 5
    NOT_ADMITTED = 6


_COMPLAINTS: dict[Verdict, tuple[str, str]] = {
    Verdict.NOT_AUTHENTIC: ("cluster_token", "the two workers do not share a cluster token"),
    Verdict.WRONG_VERSION: ("version", "the two workers speak different versions of the data link"),
    Verdict.WRONG_WORKER: ("worker_id", "another decode worker listens at this address"),
    Verdict.WRONG_INCARNATION: ("incarnation", "another incarnation of the decode worker listens at this address"),
    Verdict.WRONG_LAYOUT: ("layout_fingerprint", "the two workers' KV layouts differ"),
    Verdict.NOT_ADMITTED: ("incarnation", "the decode worker knows a later incarnation of this worker"),
}


def refusal(verdict: Verdict) -> HandshakeRefused:
    param, text = _COMPLAINTS[verdict]
    return HandshakeRefused(text, param=param)


@dataclass(frozen=True, slots=True)
class Hello:
    version: int
    own: PeerName
    wanted: PeerName
    layout_fingerprint: bytes
    challenge: bytes

    def encode(self) -> bytes:
        own, wanted = self.own.worker_id.encode(), self.wanted.worker_id.encode()
        if not 0 < len(own) <= MAX_NAME_BYTES or not 0 < len(wanted) <= MAX_NAME_BYTES:
            raise HandshakeRefused(f"a worker id has 1 to {MAX_NAME_BYTES} bytes", param="worker_id")
        fixed = _HELLO.pack(
            _HELLO_MAGIC,
            self.version,
            len(own),
            len(wanted),
            self.own.incarnation,
            self.wanted.incarnation,
            self.layout_fingerprint,
            self.challenge,
        )
        return fixed + own + wanted


@dataclass(frozen=True, slots=True)
class PoolShape:
    num_blocks: int
    block_bytes: int


def prefill_proof(secret: bytes, hello: bytes, challenge: bytes) -> bytes:
    return hmac.digest(secret, _PREFILL_TAG + challenge + hello, "sha256")


def judge(hello: Hello, credentials: LinkCredentials, admit: Callable[[PeerName], str | None]) -> Verdict:
    """What a decode worker thinks of a prefill worker that has proven its name."""
    if hello.version != LINK_VERSION:
        return Verdict.WRONG_VERSION
    if hello.wanted.worker_id != credentials.name.worker_id:
        return Verdict.WRONG_WORKER
    if hello.wanted.incarnation != credentials.name.incarnation:
        return Verdict.WRONG_INCARNATION
    if hello.layout_fingerprint != credentials.layout_fingerprint:
        return Verdict.WRONG_LAYOUT
    return Verdict.WELCOME if admit(hello.own) is None else Verdict.NOT_ADMITTED


async def authenticate_as_prefill(sock: socket.socket, credentials: LinkCredentials, peer: PeerName, shape: PoolShape) -> None:
    """Raises HandshakeRefused if the other end refuses us, is not `peer`, or has a pool of another shape. The socket does not
    block; the caller closes it whatever happens."""
    hello = Hello(
        LINK_VERSION, credentials.name, peer, credentials.layout_fingerprint, secrets.token_bytes(CHALLENGE_BYTES)
    ).encode()
    loop = asyncio.get_running_loop()
    async with _bounded():
        await loop.sock_sendall(sock, hello)
        challenge = await _receive(sock, CHALLENGE_BYTES)
        await loop.sock_sendall(sock, prefill_proof(credentials.secret, hello, challenge))
        message = await _receive(sock, _VERDICT.size)
    code, num_blocks, block_bytes, proof = _VERDICT.unpack(message)
    if not hmac.compare_digest(proof, _decode_proof(credentials.secret, hello, challenge, message[:-PROOF_BYTES])):
        raise refusal(Verdict.NOT_AUTHENTIC)
    try:
        verdict = Verdict(code)
    except ValueError as error:
        raise HandshakeRefused(f"the decode worker refused for the unknown reason {code}", param="version") from error
    if verdict is not Verdict.WELCOME:
        raise refusal(verdict)
    if PoolShape(num_blocks, block_bytes) != shape:
        raise HandshakeRefused("the decode worker's pool has another shape than it announced", param="pool_blocks")


async def authenticate_as_decode(
    sock: socket.socket, credentials: LinkCredentials, shape: PoolShape, admit: Callable[[PeerName], str | None]
) -> PeerName:
    """Returns who the other end is. Raises HandshakeRefused, after telling a peer that proved its name why."""
    loop = asyncio.get_running_loop()
    async with _bounded():
        fixed = await _receive(sock, _HELLO.size)
        magic, version, own_length, wanted_length, own_incarnation, wanted_incarnation, layout, their = _HELLO.unpack(fixed)
        if magic != _HELLO_MAGIC or not 0 < own_length <= MAX_NAME_BYTES or not 0 < wanted_length <= MAX_NAME_BYTES:
            raise refusal(Verdict.NOT_AUTHENTIC)
        names = await _receive(sock, own_length + wanted_length)
        challenge = secrets.token_bytes(CHALLENGE_BYTES)
        await loop.sock_sendall(sock, challenge)
        hello_bytes = fixed + names
        proof = await _receive(sock, PROOF_BYTES)
        if not hmac.compare_digest(proof, prefill_proof(credentials.secret, hello_bytes, challenge)):
            await loop.sock_sendall(sock, _VERDICT.pack(Verdict.NOT_AUTHENTIC, 0, 0, bytes(PROOF_BYTES)))
            raise refusal(Verdict.NOT_AUTHENTIC)
        try:
            own_name, wanted_name = names[:own_length].decode(), names[own_length:].decode()
        except UnicodeDecodeError as error:
            raise refusal(Verdict.NOT_AUTHENTIC) from error
        hello = Hello(version, PeerName(own_name, own_incarnation), PeerName(wanted_name, wanted_incarnation), layout, their)
        verdict = judge(hello, credentials, admit)
        message = _VERDICT.pack(verdict, shape.num_blocks, shape.block_bytes, bytes(PROOF_BYTES))[:-PROOF_BYTES]
        await loop.sock_sendall(sock, message + _decode_proof(credentials.secret, hello_bytes, challenge, message))
    if verdict is not Verdict.WELCOME:
        raise refusal(verdict)
    return hello.own


def _decode_proof(secret: bytes, hello: bytes, challenge: bytes, message: bytes) -> bytes:
    return hmac.digest(secret, _DECODE_TAG + challenge + message + hello, "sha256")


@asynccontextmanager
async def _bounded() -> AsyncIterator[None]:
    """A deadline, and every way in which a socket can fail as an error of ours."""
    try:
        async with asyncio.timeout(AUTHENTICATION_TIMEOUT_S):
            yield
    except TimeoutError as error:
        raise TransferBroken("the peer did not authenticate in time") from error
    except OSError as error:
        raise TransferBroken("the link went away while it was being authenticated") from error


async def _receive(sock: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes and not one more: on shm the next byte carries the descriptor."""
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < size:
        part = await loop.sock_recv(sock, size - len(data))
        if not part:
            raise TransferBroken("the peer hung up while the link was being authenticated")
        data += part
    return bytes(data)
