"""Both ends in one process and on one event loop, for tests and simulations: the contract of shm without processes and threads.

The sender copies into the receiver's region by itself, one block per turn of the event loop, so a cancel can fall between any two
blocks; nobody fences it. The proofs of identity are the real ones, passed by hand.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Callable, Sequence

from common.errors import HandoffError, HandshakeRefused, TransferBroken
from kvtransfer.digest import block_digest
from kvtransfer.region import BlockRegion
from kvtransfer.transports.authentication import CHALLENGE_BYTES, LINK_VERSION, Hello, Verdict, judge, prefill_proof, refusal
from kvtransfer.transports.base import Landing, LinkCredentials, Listener, PeerName, Piece, SenderLink

KIND = "inproc"
_LISTENERS: dict[str, InprocListener] = {}


class InprocTransport:
    def can_serve(self, region: BlockRegion) -> bool:
        return True

    async def listen(self, landing: Landing, credentials: LinkCredentials, region: BlockRegion, host: str) -> Listener:
        listener = InprocListener(f"inproc-{secrets.token_hex(8)}", landing, credentials, region)
        _LISTENERS[listener.address] = listener
        return listener

    async def connect(
        self, address: str, credentials: LinkCredentials, peer: PeerName, *, pool_blocks: int, block_bytes: int
    ) -> SenderLink:
        listener = _LISTENERS.get(address)
        if listener is None:
            raise TransferBroken("no decode worker of this process listens at the offered address")
        if (listener.region.num_blocks, listener.region.block_bytes) != (pool_blocks, block_bytes):
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
        self._links: set[InprocLink] = set()

    def accept(self, hello: Hello, challenge: bytes, proof: bytes) -> InprocLink:
        verdict = Verdict.NOT_AUTHENTIC
        if hmac.compare_digest(proof, prefill_proof(self._credentials.secret, hello.encode(), challenge)):
            verdict = judge(hello, self._credentials, self.landing.admit)
        if verdict is not Verdict.WELCOME:
            error = refusal(verdict)
            self.landing.link_refused(error)
            raise error
        link = InprocLink(self, hello.own)
        self._links.add(link)
        return link

    def forget(self, link: InprocLink) -> None:
        self._links.discard(link)

    async def close(self) -> None:
        _LISTENERS.pop(self.address, None)
        for link in tuple(self._links):
            link.drop(TransferBroken("the link to the decode worker went away"))


class InprocLink:
    """Both ends of a link: `SenderLink` to the one side, `ReceiverLink` to the other."""

    kind = KIND
    fences_locally = False

    def __init__(self, listener: InprocListener, peer: PeerName) -> None:
        self.peer = peer
        self.lost: HandoffError | None = None
        self._listener = listener

    async def open_writer(self, nonce: bytes) -> None:
        await asyncio.sleep(0)
        self._check()
        refused = self._listener.landing.writer_opened(self, nonce)
        if refused is not None:
            raise refused.as_error()

    async def write(self, nonce: bytes, pieces: Sequence[Piece], stop: Callable[[], bool]) -> list[bytes]:
        digests: list[bytes] = []
        for piece in pieces:
            await asyncio.sleep(0)
            self._check()
            if stop():
                break
            digest = block_digest(piece.source, nonce, piece.logical_block)
            self._listener.region.block(piece.destination_block)[:] = piece.source
            self._listener.landing.block_written(self, nonce, piece.logical_block, digest, None)
            digests.append(digest)
        return digests

    async def close_writer(self, nonce: bytes) -> None:
        if self.lost is None:
            self._listener.landing.writer_closed(self, nonce)

    def drop(self, error: HandoffError) -> None:
        if self.lost is None:
            self.lost = error
            self._listener.landing.link_lost(self)
            self._listener.forget(self)

    async def close(self) -> None:
        self.drop(TransferBroken("the link was closed"))

    def _check(self) -> None:
        if self.lost is not None:
            raise self.lost
