"""Where the prefill worker's engine meets KV transfer: finished blocks of a prompt go to the decode worker that asked for them.

    begin(ticket) -> Push ── computed(...) after each group of layers of each chunk: it leaves while the next one computes
                          ├─ finish() -> the account for the seal
                          └─ abort(): nothing is read or written any more

Only blocks that the ticket names travel: what the decode worker had already, it did not ask for. They are numbered, and cut, as
its pool is: a block is final when all its tokens were computed here, whatever the blocks here are. Where either worker has
several ranks, each rank here writes what is its own to the ranks there that want it (`kvtransfer.ranks`), as it is told here.
This file and its twin in `decode_worker` are the only ones that know both sides.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from common.blocks import num_blocks, num_full_blocks
from common.clock import Clock
from common.codec import layout_from_wire, ticket_from_wire
from common.config import pdserve_home
from common.errors import HandshakeRefused
from common.logs import get_logger
from common.metrics import LeaseReadings
from common.types import KVLayout, Ticket
from common.wire import worker_pb2
from common.worker import WorkerSpec
from kvtransfer import PROTOCOL_VERSION
from kvtransfer.device import region_of_pool
from kvtransfer.native.choice import prepare
from kvtransfer.probe import ProbeOrder, ProbeSource
from kvtransfer.ranks.orders import RankOrders
from kvtransfer.ranks.parts import Degrees, window_of
from kvtransfer.ranks.rank_end import Introduction, RankEnd
from kvtransfer.ranks.rank_senders import GroupOutgoing, PeerGroup, RankSenders
from kvtransfer.region import BlockRegion, PoolMemory
from kvtransfer.sender import KVSender, Outgoing, TransferAccount
from kvtransfer.ticket import derive_secret
from kvtransfer.transports.base import TransportOffer

__all__ = ["MakeSender", "PoolMemory", "PrefillHandoff", "Push", "region_of_pool"]

_log = get_logger(__name__)


class MakeSender(Protocol):
    def __call__(
        self,
        region: BlockRegion,
        layout: KVLayout,
        worker_id: str,
        incarnation: int,
        secret: bytes,
        clock: Clock,
        *,
        lease_s: float,
    ) -> KVSender: ...


class PrefillHandoff:
    """One per worker; lives on its asyncio loop."""

    def __init__(
        self,
        spec: WorkerSpec,
        layout: KVLayout,
        region: BlockRegion,
        clock: Clock,
        *,
        make_sender: MakeSender = KVSender,
        ranks: Sequence[socket.socket] = (),
    ) -> None:
        """`region` is this process's KV memory; `ranks` lead to the worker's other ranks, and `layout` is that of blocks of all
        of them together."""
        self._spec = spec
        self._layout = layout
        secret = derive_secret(spec.cluster_token)
        self._degrees = Degrees(spec.parallel.tensor_parallel, spec.parallel.pipeline_parallel)
        own = window_of(layout, self._degrees, 0)
        self._sender = make_sender(region, own, spec.worker_id, spec.incarnation, secret, clock, lease_s=spec.transfer.lease_s)
        self._ranks = RankSenders(
            [RankEnd(region, clock), *(RankOrders(end, rank) for rank, end in enumerate(ranks, 1))],
            self._degrees,
            Introduction(spec.worker_id, spec.incarnation, secret, layout, spec.transfer.lease_s),
            clock,
        )
        self._probes = ProbeSource(spec.worker_id, spec.incarnation, secret, clock)

    def leases(self) -> LeaseReadings:
        """From any thread."""
        return self._sender.leases() + self._ranks.leases()

    def prepare(self) -> None:
        """Has the native library for copies ready before long, compiled if need be; transfers do not wait for it."""
        threading.Thread(target=prepare, args=(pdserve_home() / "kernels", _log.warning), name="kv-native", daemon=True).start()

    async def handshake(self, message: worker_pb2.HandshakeRequest) -> worker_pb2.HandshakeReply:
        """A decode worker introduces itself. Raises HandshakeRefused naming what differs, or what could not be reached."""
        if message.protocol_version != PROTOCOL_VERSION:
            raise HandshakeRefused(
                f"transfer protocol {message.protocol_version} there, {PROTOCOL_VERSION} here", param="protocol_version"
            )
        theirs = Degrees(message.tensor_parallel or 1, message.pipeline_parallel or 1)
        layout = layout_from_wire(message.layout)
        if self._degrees.num_ranks == theirs.num_ranks == 1:
            kind = await self._sender.connect(
                message.decode_worker_id, message.decode_incarnation, _offers(message.offers), message.pool_blocks, layout
            )
        elif message.ranks:
            offers = tuple(_offers(rank.offers) for rank in message.ranks)
            kind = await self._ranks.connect(
                PeerGroup(message.decode_worker_id, message.decode_incarnation, theirs, offers, message.pool_blocks, layout)
            )
        else:
            kind = ""  # a worker of one process could not know
        return worker_pb2.HandshakeReply(
            prefill_worker_id=self._spec.worker_id,
            prefill_incarnation=self._spec.incarnation,
            transport=kind,
            tensor_parallel=self._degrees.tensor_parallel,
            pipeline_parallel=self._degrees.pipeline_parallel,
        )

    async def begin(self, tickets: Sequence[Ticket]) -> Push:
        """One ticket, or those of all pairs of ranks. Raises TicketRefused."""
        first = tickets[0]
        outgoing = self._sender.open(first) if len(tickets) == 1 else await self._ranks.open(tickets)
        return Push(outgoing, first, self._layout)

    async def release(self, nonces: Sequence[bytes]) -> None:
        """When it returns nothing more is written under these nonces, ever."""
        await self._sender.release(nonces)
        await self._ranks.release(nonces)

    async def push_probe(self, message: worker_pb2.PushProbeRequest) -> worker_pb2.PushProbeReply:
        """Pushes random blocks from memory of its own. Raises HandoffError: whatever is wrong with this link."""
        order = ProbeOrder(
            decode_worker_id=message.decode_worker_id,
            decode_incarnation=message.decode_incarnation,
            offer=TransportOffer(message.offer.kind, message.offer.address),
            pool_blocks=message.pool_blocks,
            layout=layout_from_wire(message.layout),
            tickets=tuple(ticket_from_wire(ticket) for ticket in message.tickets),
        )
        return worker_pb2.PushProbeReply(
            accounts=[
                worker_pb2.PrefillReply(
                    nonce=report.seal.nonce,
                    num_tokens=report.seal.num_tokens,
                    digests=[
                        worker_pb2.BlockDigest(logical_block=logical, digest=digest)
                        for logical, digest in report.seal.digests.items()
                    ],
                    transfer_s=report.transfer_s,
                )
                for report in await self._probes.push(order)
            ]
        )

    async def close(self) -> None:
        await self._probes.close()
        await self._sender.close()
        await self._ranks.close()


@dataclass(frozen=True, slots=True)
class PushAccount:
    """What was written: goes into the seals."""

    digests: Mapping[bytes, Mapping[int, bytes]]  # nonce -> logical block -> digest
    num_blocks: int
    bytes: int
    transfer_s: float  # time in which something was being written


class Push:
    """The outgoing KV of one prompt."""

    def __init__(self, outgoing: Outgoing | GroupOutgoing, ticket: Ticket, layout: KVLayout) -> None:
        self._outgoing = outgoing
        self._ticket = ticket
        self._block_tokens = outgoing.block_tokens or layout.block_tokens  # of the blocks that are asked for
        self._num_layers = layout.num_layers
        self._next = ticket.first_block  # logical blocks below it have been pushed with all layers, or were not asked for

    async def computed(self, num_tokens: int, blocks: Sequence[int], first_layer: int, end_layer: int) -> None:
        """Layers [first, end) of the prompt's first `num_tokens` tokens are in `blocks`; called in order of chunks, and of layers
        within a chunk. Waits only while too much is queued; raises HandoffError."""
        at_end = num_tokens == self._ticket.num_tokens
        final = num_blocks(num_tokens, self._block_tokens) if at_end else num_full_blocks(num_tokens, self._block_tokens)
        if final > self._next:
            asked = range(self._next, final)
            if end_layer == self._num_layers:
                self._next = final
            await self._outgoing.push_prompt(asked, blocks, (first_layer, end_layer))

    async def finish(self) -> PushAccount:
        """Returns when all was written. Raises HandoffError."""
        account = await self._outgoing.finish()
        digests = {self._ticket.nonce: account.digests} if isinstance(account, TransferAccount) else account.digests
        return PushAccount(digests, len(self._ticket.blocks), account.bytes, account.transfer_s)

    async def abort(self) -> None:
        """Returns when no block is read any more; at once after `finish`. Idempotent."""
        await self._outgoing.abort()


def _offers(offers: Iterable[worker_pb2.TransportOffer]) -> tuple[TransportOffer, ...]:
    return tuple(TransportOffer(offer.kind, offer.address) for offer in offers)
