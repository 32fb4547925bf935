"""The decode worker's end of a link over shared memory: what a peer announces is fetched from its pool.

    READY(pieces, places) -> may they be written? -> pool <- one pass: copy and digest -> TAKEN
    WRITTEN(the same pieces, in order, digests) -> report

This process alone writes into its pool, so a writer is fenced by not fetching for it any more: before each call of native code,
which copies many pieces (`native.following`), and before each piece here, where there is no such code or somebody must see each
piece before it is looked at. What is fetched for nobody is digested where it lies, and dropped.

What a peer has that does not lie in its pool comes as payload over the socket, as over tcp.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Sequence

from common.errors import TransferBroken
from common.types import KVLayout
from kvtransfer.frames import Frame, FrameKind, decode_places
from kvtransfer.native.choice import piece_kernel
from kvtransfer.native.following import Following, PoolPlaces
from kvtransfer.region import BlockRegion
from kvtransfer.transports.base import Landing, LinkCredentials, PeerName, PieceName, Written
from kvtransfer.transports.listening import StreamListener
from kvtransfer.transports.peer_pool import PeerPool, receive_pool
from kvtransfer.transports.receiving import Part, StreamReceiverLink

PARTS_PER_WAKEUP = 64  # headers and tables that are looked at beside native code


class FetchingLink(StreamReceiverLink):
    def __init__(
        self,
        sock: socket.socket,
        peer: PeerName,
        landing: Landing,
        layout: KVLayout,
        pool_address: int,
        source: PeerPool,
        *,
        kind: str,
        on_end: Callable[[StreamReceiverLink], None],
    ) -> None:
        """`source` is the link's from now on."""
        super().__init__(sock, peer, landing, layout, kind=kind, data_kind=FrameKind.BLOCKS, on_end=on_end)
        self._data_kinds = frozenset({FrameKind.BLOCKS, FrameKind.READY, FrameKind.WRITTEN})
        self._reads_ahead_bytes = len(self._inbox)
        self._pool_address = pool_address
        self._source = source
        self._following: Following | None = None  # once there is a writer that native code can follow
        self._fetched: deque[tuple[PieceName, memoryview | None]] = deque()  # here, and not stated yet; with its bytes if dropped
        self._fetched_for = b""  # the writer of these

    def end(self) -> None:
        super().end()
        self._source.close()

    # -- by native code -----------------------------------------------------------------------------------------------

    def _header_received(self, frame: Frame) -> None:
        asks = frame.kind is FrameKind.OPEN and not self._may_write(frame.nonce)  # it may ask again, in vain
        super()._header_received(frame)
        if asks:
            self._let_in(frame.nonce)
        elif self._following is not None and frame.kind in (FrameKind.READY, FrameKind.BLOCKS):
            self._following.leave(frame.nonce)

    def _let_in(self, nonce: bytes) -> None:
        kernel, ticket = piece_kernel(), self._landing.ticket_of(self, nonce)
        if kernel is None or ticket is None or self._ended or self._layer_bytes < kernel.least_bytes:
            return
        if self._following is None:
            layout, source = self._layout, self._source
            places = PoolPlaces(
                self._pool_address, layout.block_bytes, self._layer_bytes, source.address, source.bytes.nbytes, layout.num_layers
            )
            self._following = Following(kernel, self._sock.fileno(), places, self._inbox)
        self._following.let_in(ticket)

    def _may_write(self, nonce: bytes) -> bool:
        return self._landing.ticket_of(self, nonce) is not None

    def _readable(self) -> None:
        if self._following is None or self._ended:
            super()._readable()
        else:
            self._follow(self._following)

    def _follow(self, following: Following) -> None:
        """Announcements are read and fetched by native code, everything else here; after a report others get their turn."""
        self._begin_turn()
        for _ in range(PARTS_PER_WAKEUP):
            if self._part is Part.HEADER:
                following.keep(self._may_write)
                nonce, pieces, num_untold, self._begin, self._end, drained, enough = following.follow(self._begin, self._end)
                if num_untold:
                    self._say_taken(nonce, num_untold)
                if pieces and not self._ended:
                    self._landing.pieces_written(self, nonce, pieces)
                if drained or self._ended:
                    return
                if pieces or enough:
                    break
            if self._has_more:
                self._handle_part()
            elif not self._read_once():
                return
            if self._ended:
                return
            if self._turn_is_over:
                break
        self._loop.call_soon(self._readable)

    # -- piece by piece -----------------------------------------------------------------------------------------------

    def _tabled(self, part: memoryview) -> None:
        if self._frame.kind is FrameKind.READY:
            self._fetch(decode_places(part, self._layout.num_layers))
        else:
            super()._tabled(part)

    def _fetch(self, placed: Sequence[tuple[PieceName, int]]) -> None:
        if self._following is not None:
            self._following.drop_fetched()
        self._fetched.clear()
        self._fetched_for = nonce = self._frame.nonce
        source = self._source.bytes
        for name, start_bytes in placed:
            size_bytes = name.num_layers * self._layer_bytes
            if start_bytes + size_bytes > source.nbytes:
                raise TransferBroken(f"{size_bytes} bytes at {start_bytes} are not in the prefill worker's pool")
            there = source[start_bytes : start_bytes + size_bytes]
            place = self._landing.destination(self, nonce, name)
            if place is not None:
                place[:] = there
            self._fetched.append((name, None if place is not None else there))
            self._note_looked_at(size_bytes)
        self._say_taken(nonce, len(placed))

    def _table_received(self, pieces: list[Written]) -> None:
        """Of BLOCKS, as over tcp; or of WRITTEN, which states what is next of what was fetched here."""
        if self._frame.kind is not FrameKind.WRITTEN:
            super()._table_received(pieces)
            return
        fetched = [self._fetched.popleft() for _ in pieces if self._fetched]
        if self._fetched_for != self._frame.nonce or [name for name, _ in fetched] != [piece.name for piece in pieces]:
            raise TransferBroken("digests are stated of other pieces than were ready")
        reported = [piece._replace(dropped=dropped) for piece, (_, dropped) in zip(pieces, fetched, strict=True)]
        self._landing.pieces_written(self, self._frame.nonce, reported)

    def _say_taken(self, nonce: bytes, num_pieces: int) -> None:
        self._say(Frame(FrameKind.TAKEN, nonce, amount=num_pieces))


class FetchingListener(StreamListener):
    def __init__(
        self,
        sock: socket.socket,
        address: str,
        landing: Landing,
        credentials: LinkCredentials,
        region: BlockRegion,
        layout: KVLayout,
        *,
        kind: str,
    ) -> None:
        super().__init__(sock, address, landing, credentials, region, layout, kind=kind, data_kind=FrameKind.BLOCKS)
        self._pool_address = region.address

    async def _welcome(self, sock: socket.socket, peer: PeerName) -> StreamReceiverLink:
        source = await receive_pool(sock)
        ours = self._landing, self._layout, self._pool_address
        return FetchingLink(sock, peer, *ours, source, kind=self._kind, on_end=self._links.discard)
