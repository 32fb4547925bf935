"""Both ends in one process and on one event loop, for tests: the contract of cuda_ipc without processes, threads and a GPU.

The sender copies into the receiver's region by itself, one piece per turn of the event loop, so a cancel can fall between any two
pieces; nobody fences it. The proofs of identity are the real ones, passed by hand.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Callable, Mapping, Sequence

from common.errors import HandoffError, HandshakeRefused, TransferBroken
from common.types import KVLayout
from kvtransfer.digest import piece_digest
from kvtransfer.region import BlockRegion
from kvtransfer.transports.authentication import CHALLENGE_BYTES, LINK_VERSION, Hello, Verdict, judge, prefill_proof, refusal
from kvtransfer.transports.base import (
    Landing,
    LinkCredentials,
    Listener,
    PeerName,
    Piece,
    Refusal,
    SenderLink,
    WriterNews,
    Written,
)

KIND = "inproc"
NOTICE_S = 0.01  # until a writer sees that the other end has hung up
_LISTENERS: dict[str, InprocListener] = {}


class InprocTransport:
    def can_serve(self, region: BlockRegion) -> bool:
        return True

    async def listen(
        self, landing: Landing, credentials: LinkCredentials, region: BlockRegion, layout: KVLayout, host: str
    ) -> Listener:
        listener = InprocListener(f"inproc-{secrets.token_hex(8)}", landing, credentials, region)
        _LISTENERS[listener.address] = listener
        return listener

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
        listener = _LISTENERS.get(address)
        if listener is None:
            raise TransferBroken("no decode worker of this process listens at the offered address")
        if (listener.region.num_blocks, listener.region.block_bytes) != (pool_blocks, layout.block_bytes):
            raise HandshakeRefused("the decode worker's pool has another shape than it announced", param="pool_blocks")
        challenge = secrets.token_bytes(CHALLENGE_BYTES)
        hello = Hello(LINK_VERSION, credentials.name, peer, credentials.layout_fingerprint, secrets.token_bytes(CHALLENGE_BYTES))
        proof = prefill_proof(credentials.secret, hello.encode(), challenge)
        return listener.accept(hello, challenge, proof)


class InprocListener:
    def __init__(self, address: str, landing: Landing, credentials: LinkCredentials, region: BlockRegion) -> None:
        self.address = address
        self.region = region
        self.landing = landing
        self._credentials = credentials
        self._links: set[InprocSenderLink] = set()

    def accept(self, hello: Hello, challenge: bytes, proof: bytes) -> InprocSenderLink:
        verdict = Verdict.NOT_AUTHENTIC
        if hmac.compare_digest(proof, prefill_proof(self._credentials.secret, hello.encode(), challenge)):
            verdict = judge(hello, self._credentials, self.landing.admit)
        if verdict is not Verdict.WELCOME:
            error = refusal(verdict)
            self.landing.link_refused(error)
            raise error
        link = InprocSenderLink(self, hello.own)
        self._links.add(link)
        return link

    def forget(self, link: InprocSenderLink) -> None:
        self._links.discard(link)

    async def close(self) -> None:
        _LISTENERS.pop(self.address, None)
        for link in tuple(self._links):
            link.drop(TransferBroken("the link to the decode worker went away"))


class InprocSenderLink:
    kind = KIND

    def __init__(self, listener: InprocListener, peer: PeerName) -> None:
        self.lost: HandoffError | None = None
        self.news: dict[bytes, WriterNews] = {}
        self._listener = listener
        self._landing = listener.landing
        self._far_end = InprocReceiverLink(peer, self.news, self.drop)

    async def open_writer(self, nonce: bytes, news: WriterNews) -> None:
        await asyncio.sleep(0)
        self._check()
        answer = self._landing.writer_opened(self._far_end, nonce)
        if isinstance(answer, Refusal):
            raise answer.as_error()
        self.news[nonce] = news
        self._far_end.credit(nonce, answer)

    async def write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        digests: list[bytes] = []
        for name, offset_bytes, source in pieces:
            await asyncio.sleep(0)
            self._check()
            if stop():
                break
            digest = piece_digest(source, nonce, *name)
            self._listener.region.buffer[offset_bytes : offset_bytes + source.nbytes] = source
            self._landing.pieces_written(self._far_end, nonce, [Written(name, digest, None)])
            digests.append(digest)
        return digests

    def pulse(self, nonce: bytes) -> None:
        if self.lost is None:
            self._landing.writer_alive(self._far_end, nonce)

    async def close_writer(self, nonce: bytes) -> None:
        self.news.pop(nonce, None)
        if self.lost is None:
            self._landing.writer_closed(self._far_end, nonce)

    def drop(self, error: HandoffError) -> None:
        if self.lost is None:
            self.lost = error
            self.news.clear()
            self._landing.link_lost(self._far_end)
            self._listener.forget(self)

    async def close(self) -> None:
        self.drop(TransferBroken("the link was closed"))

    def _check(self) -> None:
        if self.lost is not None:
            raise self.lost


class InprocReceiverLink:
    kind = KIND
    fences_locally = False

    def __init__(self, peer: PeerName, news: Mapping[bytes, WriterNews], drop: Callable[[HandoffError], None]) -> None:
        self.peer = peer
        self._news = news
        self._drop = drop

    def credit(self, nonce: bytes, size_bytes: int) -> None:
        writer = self._news.get(nonce)
        if writer is not None:
            writer.renewed()
            writer.credited(size_bytes)

    def pulse(self, nonce: bytes) -> None:
        writer = self._news.get(nonce)
        if writer is not None:
            writer.renewed()

    def hang_up(self) -> None:
        """The writer hears of it a little later, as one in another process would."""
        error = TransferBroken("the link to the decode worker went away")
        asyncio.get_running_loop().call_later(NOTICE_S, self._drop, error)
