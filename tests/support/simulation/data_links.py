"""Data links between simulated workers, behind the real `kvtransfer.transports.base`: three flavours of them.

| kind     | a piece                                                     | after the decode side has given up                   |
|----------|-------------------------------------------------------------|------------------------------------------------------|
| cuda_ipc | the sender writes it into the pool itself, in halves        | may still arrive, until CLOSE or the end of the link |
| shm      | the receiver fetches it, in halves, once it hears of it     | goes nowhere, at once                                |
| tcp      | travels in parts; the receiver asks where they go           | goes nowhere, at once                                |

`sender_links` and `receiver_links` have the ends, `fetching_links` those of shm; here is how they come together. Proofs of
identity and their judgement are the real ones. A link is broken by the network, or, where its sender writes into the pool, by
that alone.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable

from common.errors import TransferBroken
from common.types import KVLayout
from kvtransfer.region import BlockRegion
from kvtransfer.transports import authentication
from kvtransfer.transports.authentication import CHALLENGE_BYTES, LINK_VERSION, Hello, Verdict, prefill_proof, refusal
from kvtransfer.transports.base import Landing, LinkCredentials, Listener, PeerName, SenderLink, Transport
from support.simulation.fetching_links import FetchingReceiverLink, LendingSenderLink
from support.simulation.network import Network, Wire
from support.simulation.receiver_links import SimReceiverLink, UnfencedReceiverLink, WireReceiverLink
from support.simulation.sender_links import GONE, MappingSenderLink, SimSenderLink, WireSenderLink
from support.simulation.virtual_loop import ProcessLoop, running_process

AUTHENTICATION_TIMEOUT_S = 5.0
_ENDS: dict[str, tuple[type[SimSenderLink], type[SimReceiverLink]]] = {
    "cuda_ipc": (MappingSenderLink, UnfencedReceiverLink),
    "shm": (LendingSenderLink, FetchingReceiverLink),
    "tcp": (WireSenderLink, WireReceiverLink),
}


class SimTransport:
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def can_serve(self, region: BlockRegion) -> bool:
        return True

    async def listen(
        self, landing: Landing, credentials: LinkCredentials, region: BlockRegion, layout: KVLayout, host: str
    ) -> Listener:
        loop = running_process()
        listener = SimListener(self.kind, loop, landing, credentials)
        loop.host.network.data_listeners[listener.address] = listener
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
        loop = running_process()
        network: Network = loop.host.network
        challenge = bytes(CHALLENGE_BYTES)
        hello = Hello(LINK_VERSION, credentials.name, peer, credentials.layout_fingerprint, bytes(CHALLENGE_BYTES))
        proof = prefill_proof(credentials.secret, hello.encode(), challenge)
        listener = network.data_listeners.get(address)
        if listener is None:
            await asyncio.sleep(network.delay_s())
            raise TransferBroken("no decode worker listens at the offered address")
        wire = Wire(network, loop, listener.loop, pinged=False, local=self.kind != "tcp")
        verdict: asyncio.Future[Verdict | SimReceiverLink] = loop.create_future()

        def answered(answer: Verdict | SimReceiverLink) -> None:
            if not verdict.done():
                verdict.set_result(answer)

        def ended() -> None:
            if not verdict.done():
                verdict.set_exception(TransferBroken(GONE))

        wire.on_end_a = ended
        wire.send(loop, lambda: wire.send(listener.loop, answered, listener.judge(hello, challenge, proof, wire)))
        try:
            async with asyncio.timeout(AUTHENTICATION_TIMEOUT_S):
                answer = await verdict
        except TimeoutError as error:
            wire.close(loop)
            raise TransferBroken("the decode worker did not answer in time") from error
        except BaseException:
            wire.close(loop)
            raise
        if isinstance(answer, Verdict):
            wire.close(loop)
            raise refusal(answer)
        sender, _ = _ENDS[self.kind]
        return sender(self.kind, network, loop, wire, answer)


class SimListener:
    def __init__(self, kind: str, loop: ProcessLoop, landing: Landing, credentials: LinkCredentials) -> None:
        self.loop = loop
        self.address = f"{kind}://{loop.host.data_address}"
        self._kind = kind
        self._landing = landing
        self._credentials = credentials
        self._links: dict[SimReceiverLink, None] = {}

    def judge(self, hello: Hello, challenge: bytes, proof: bytes, wire: Wire) -> Verdict | SimReceiverLink:
        verdict = Verdict.NOT_AUTHENTIC
        if proof == prefill_proof(self._credentials.secret, hello.encode(), challenge):
            verdict = authentication.judge(hello, self._credentials, self._landing.admit)
        if verdict is not Verdict.WELCOME:
            self._landing.link_refused(refusal(verdict))
            return verdict
        _, receiver = _ENDS[self._kind]
        link = receiver(self._kind, hello.own, self.loop, wire, self._landing, self._forget)
        self._links[link] = None
        return link

    def _forget(self, link: SimReceiverLink) -> None:
        self._links.pop(link, None)

    async def close(self) -> None:
        self.loop.host.network.data_listeners.pop(self.address, None)
        for link in tuple(self._links):
            link.end()


SIM_TRANSPORTS: dict[str, Callable[[], Transport]] = {kind: functools.partial(SimTransport, kind) for kind in _ENDS}
