"""Two processes that share a GPU: the prefill worker opens the decode worker's pool and copies blocks into it, on the device.

    d                                                        p
    abstract Unix socket (no file)           <-------------  connect, authenticate
    handle of the pool, its size             ------------->  open, or hang up: not this host, not this GPU
    pool  <========= one launch for a batch, own stream ===  source blocks
    sums of what is in the pool == ?         <-- WRITTEN --  sums of what was copied, many pieces in one frame

A handle is bytes of the driver's; it is neither an object nor code. Copies run on a stream of their own beside the steps of both
engines. The lane waits for the event behind a batch and only then says WRITTEN: what is announced is there.

The writer cannot be fenced: d's blocks stay in quarantine until p says CLOSE or its socket ends. A link that is
closed lets go of the pool first. A process that dies takes its work on the device along before its sockets end, which is the
driver's doing; one that is stopped may have a batch in the device's queue, and that batch runs: no timeout makes such a block
safe, and none is used.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import struct
from collections.abc import Callable, Sequence
from functools import partial

from common.errors import HandshakeRefused, StartupError, TransferBroken
from common.types import KVLayout
from kvtransfer.device import DeviceRegion, DeviceView, PeerMemory
from kvtransfer.digest import device_digest
from kvtransfer.frames import MAX_PIECES, Frame, FrameKind, encode_table
from kvtransfer.region import BlockRegion
from kvtransfer.transports.authentication import AUTHENTICATION_TIMEOUT_S, PoolShape, authenticate_as_prefill
from kvtransfer.transports.base import Landing, LinkCredentials, Listener, PeerName, Piece, SenderLink
from kvtransfer.transports.listening import StreamListener
from kvtransfer.transports.sending import Send, StreamSenderLink
from kvtransfer.transports.unix_socket import connect_to, listen_at

KIND = "cuda_ipc"
MAX_HANDLE_BYTES = 256
_OFFER = struct.Struct("<4sHQ")  # magic, size of the handle, size of the pool; the handle follows
_OFFER_MAGIC = b"PDCI"


class CudaIpcTransport:
    def can_serve(self, region: BlockRegion) -> bool:
        return isinstance(region, DeviceRegion)

    async def listen(
        self, landing: Landing, credentials: LinkCredentials, region: BlockRegion, layout: KVLayout, host: str
    ) -> Listener:
        if not isinstance(region, DeviceRegion):
            raise StartupError("the KV pool is not on a device", param="transports")
        offer = encode_offer(await asyncio.to_thread(region.device.handle), region.block_bytes * region.num_blocks)

        async def give_handle(sock: socket.socket) -> None:
            try:
                async with asyncio.timeout(AUTHENTICATION_TIMEOUT_S):
                    await asyncio.get_running_loop().sock_sendall(sock, offer)
            except (OSError, TimeoutError) as error:
                raise TransferBroken("the peer did not take the handle of the pool") from error

        name = f"pdserve-kv-{secrets.token_hex(16)}"
        sock = listen_at(name)
        return StreamListener(
            sock, name, landing, credentials, region, layout, kind=KIND, data_kind=FrameKind.WRITTEN, introduce=give_handle
        )

    async def connect(
        self,
        address: str,
        credentials: LinkCredentials,
        peer: PeerName,
        *,
        pool_blocks: int,
        layout: KVLayout,
        source: BlockRegion,
    ) -> SenderLink:
        if not isinstance(source, DeviceRegion):
            raise HandshakeRefused("the KV pool here is not on a device", param="transports")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            await connect_to(sock, address)
            await authenticate_as_prefill(sock, credentials, peer, PoolShape(pool_blocks, layout.block_bytes))
            handle, pool_bytes = await _receive_offer(sock)
            if pool_bytes != pool_blocks * layout.block_bytes:
                raise HandshakeRefused("the decode worker's pool has another size than it announced", param="pool_blocks")
            pool = await asyncio.to_thread(source.device.open_peer, handle, pool_bytes)
            return StreamSenderLink(sock, KIND, DeviceWriter(pool, pool_bytes))
        except BaseException:
            sock.close()
            raise


class DeviceWriter:
    """The decode worker's pool, open on our device."""

    def __init__(self, pool: PeerMemory, pool_bytes: int) -> None:
        self._pool = pool
        self._pool_bytes = pool_bytes

    def prepare(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool], send: Send) -> Callable[[], list[bytes]]:
        return partial(self._write, nonce, pieces, stop, send)

    def _write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool], send: Send) -> list[bytes]:
        """Frame by frame, each one launch that copies and sums."""
        digests: list[bytes] = []
        for first in range(0, len(pieces), MAX_PIECES):
            if stop():
                break
            frame = pieces[first : first + MAX_PIECES]
            contents = self._pool.write([self._copy_of(piece) for piece in frame])
            own = [
                device_digest(content, piece.source.nbytes, nonce, *piece.name)
                for piece, content in zip(frame, contents, strict=True)
            ]
            table = encode_table([piece.name for piece in frame], own)
            send([Frame(FrameKind.WRITTEN, nonce, count=len(frame)).encode() + table])
            digests += own
        return digests

    def close(self) -> None:
        self._pool.close()

    def _copy_of(self, piece: Piece) -> tuple[int, int, int]:
        _, offset_bytes, source = piece
        if not isinstance(source, DeviceView):
            raise TransferBroken("a piece is not in the memory of the device")
        if not 0 <= offset_bytes <= self._pool_bytes - source.nbytes:
            raise IndexError(f"{source.nbytes} bytes at {offset_bytes} of a pool of {self._pool_bytes}")
        return source.offset_bytes, offset_bytes, source.nbytes


def encode_offer(handle: bytes, pool_bytes: int) -> bytes:
    if not 0 < len(handle) <= MAX_HANDLE_BYTES:
        raise StartupError(f"a handle of {len(handle)} bytes", param="transports")
    return _OFFER.pack(_OFFER_MAGIC, len(handle), pool_bytes) + handle


def decode_offer(fixed: bytes) -> tuple[int, int]:
    """How many bytes of handle follow, and the size of the pool. Raises TransferBroken."""
    magic, handle_bytes, pool_bytes = _OFFER.unpack(fixed)
    if magic != _OFFER_MAGIC or not 0 < handle_bytes <= MAX_HANDLE_BYTES or pool_bytes <= 0:
        raise TransferBroken("the decode worker did not hand over its pool")
    return handle_bytes, pool_bytes


async def _receive_offer(sock: socket.socket) -> tuple[bytes, int]:
    try:
        async with asyncio.timeout(AUTHENTICATION_TIMEOUT_S):
            handle_bytes, pool_bytes = decode_offer(await _receive(sock, _OFFER.size))
            return await _receive(sock, handle_bytes), pool_bytes
    except TimeoutError as error:
        raise TransferBroken("the decode worker did not hand over its pool in time") from error
    except OSError as error:
        raise TransferBroken("the link went away while the pool was handed over") from error


async def _receive(sock: socket.socket, size: int) -> bytes:
    """Exactly so many: frames follow."""
    data = bytearray()
    while len(data) < size:
        part = await asyncio.get_running_loop().sock_recv(sock, size - len(data))
        if not part:
            raise TransferBroken("the peer hung up while the pool was handed over")
        data += part
    return bytes(data)
