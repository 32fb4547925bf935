"""TCP for slow links: pieces travel at one byte a value (`kvtransfer.wire_dtype`), which is lossy and says how much.

    p: a piece -> codes and scales -> what they mean, whose digest is stated      BLOCKS, as over tcp, with the codes as payload
    d: codes and scales -> scratch -> what they mean -> the pool -> its digest == the one stated?

A digest is over what ends up in the pool, as over any link, so it covers the way there and the decoding: both ends decode to the
same bits. Credit counts bytes of the pool. Nobody gets this link who did not ask for it: it is offered only where it is
configured, and exact KV is refused. Fenced as tcp is, for the bytes pass through the decode worker.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from functools import partial

from common.errors import HandoffError, HandshakeRefused, StartupError, TransferBroken
from common.types import KVLayout
from kvtransfer.digest import piece_digest
from kvtransfer.frames import MAX_PIECES, Frame, FrameKind, encode_table
from kvtransfer.region import BlockRegion
from kvtransfer.transports.authentication import PoolShape, authenticate_as_prefill
from kvtransfer.transports.base import Landing, LinkCredentials, Listener, PeerName, Piece, SenderLink
from kvtransfer.transports.listening import StreamListener
from kvtransfer.transports.receiving import StreamReceiverLink
from kvtransfer.transports.sending import Send, StreamSenderLink
from kvtransfer.transports.tcp import FRAME_BYTES, dial, listen_on, tune
from kvtransfer.wire_dtype import WireDtype, WireFormat, decode, encode

KINDS = {"tcp_int8": WireDtype.INT8, "tcp_fp8": WireDtype.FP8_E4M3}


class CodedTcpTransport:
    def __init__(self, kind: str) -> None:
        self._kind = kind

    def can_serve(self, region: BlockRegion) -> bool:
        return not region.on_device

    async def listen(
        self, landing: Landing, credentials: LinkCredentials, region: BlockRegion, layout: KVLayout, host: str
    ) -> Listener:
        try:
            wire = WireFormat(KINDS[self._kind], layout)
        except HandshakeRefused as error:
            raise StartupError(f"{self._kind}: {error.message}", param="transports") from error
        sock, address = listen_on(host)
        return CodedListener(sock, address, landing, credentials, region, layout, self._kind, wire)

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
        if source.on_device:
            raise HandshakeRefused("the KV pool here is on a device", param="transports")
        wire = WireFormat(KINDS[self._kind], layout)
        sock = await dial(address)
        try:
            await authenticate_as_prefill(sock, credentials, peer, PoolShape(pool_blocks, layout.block_bytes))
            return StreamSenderLink(sock, self._kind, CodingWriter(wire))
        except BaseException:
            sock.close()
            raise


class CodingWriter:
    def __init__(self, wire: WireFormat) -> None:
        self._wire = wire

    def prepare(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool], send: Send) -> Callable[[], list[bytes]]:
        return partial(self._write, nonce, pieces, stop, send)

    def _write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool], send: Send) -> list[bytes]:
        """Raises HandoffError for a value that is not finite: it has no code."""
        digests: list[bytes] = []
        while len(digests) < len(pieces) and not stop():
            first = len(digests)
            payload: list[bytes] = []
            payload_bytes = 0
            for name, _, source in pieces[first : first + MAX_PIECES]:
                if payload and payload_bytes + name.num_layers * self._wire.layer_bytes > FRAME_BYTES:
                    break
                coded = encode(source, self._wire)
                digests.append(piece_digest(memoryview(decode(coded, self._wire)), nonce, *name))
                payload.append(coded)
                payload_bytes += len(coded)
            header = Frame(FrameKind.BLOCKS, nonce, len(payload), payload_bytes).encode()
            names = [piece.name for piece in pieces[first : len(digests)]]
            send([header + encode_table(names, digests[first:]), *payload])
        return digests

    def close(self) -> None:
        """Nothing of the peer's is held here."""


class CodedReceiverLink(StreamReceiverLink):
    def __init__(
        self,
        sock: socket.socket,
        peer: PeerName,
        landing: Landing,
        layout: KVLayout,
        wire: WireFormat,
        *,
        kind: str,
        on_end: Callable[[StreamReceiverLink], None],
    ) -> None:
        super().__init__(
            sock, peer, landing, layout, kind=kind, data_kind=FrameKind.BLOCKS, on_end=on_end, layer_bytes=wire.layer_bytes
        )
        self._wire = wire

    def _places(self) -> list[memoryview]:
        """One piece at a time, in scratch: only whole pieces can be decoded."""
        return [self._scratch_for(self._pieces[self._next].name.num_layers * self._layer_bytes)[self._into_piece :]]

    def _payload_received(self, size_bytes: int) -> None:
        piece, nonce = self._pieces[self._next], self._frame.nonce
        piece_bytes = piece.name.num_layers * self._layer_bytes
        self._payload_left_bytes -= size_bytes
        self._into_piece += size_bytes
        if self._into_piece < piece_bytes:
            self._landing.writer_alive(self, nonce)
            return
        try:
            content = decode(self._scratch_for(piece_bytes), self._wire)
        except HandoffError as error:
            raise TransferBroken(f"a piece that nobody encodes: {error.message}") from error
        self._next += 1
        self._into_piece = 0
        self._end_of_piece()
        place = self._landing.destination(self, nonce, piece.name)
        if place is None:
            piece = piece._replace(dropped=memoryview(content))
        else:
            place[:] = content
        self._landing.pieces_written(self, nonce, [piece])


class CodedListener(StreamListener):
    def __init__(
        self,
        sock: socket.socket,
        address: str,
        landing: Landing,
        credentials: LinkCredentials,
        region: BlockRegion,
        layout: KVLayout,
        kind: str,
        wire: WireFormat,
    ) -> None:
        self._wire = wire
        super().__init__(
            sock, address, landing, credentials, region, layout, kind=kind, data_kind=FrameKind.BLOCKS, introduce=tune
        )

    async def _welcome(self, sock: socket.socket, peer: PeerName) -> StreamReceiverLink:
        await self._introduce(sock)
        return CodedReceiverLink(sock, peer, self._landing, self._layout, self._wire, kind=self._kind, on_end=self._links.discard)
