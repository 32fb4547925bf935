"""Tries the link between two workers, over every kind of transport, on memory of its own: the serving pools are not touched.

    decode worker: measure(prefill, kinds, ask)                      prefill worker: ProbeSource.push(order)
      per kind: a receiver over a small region offers it
      order = offer + tickets   ------------- gRPC ------------->    a sender over a small region connects to that offer alone,
      every block verified      <====== blocks, as in service =====  pushes each ticket's blocks
      LinkReport                <------- accounts, by ticket -----   and says how long it wrote

What is tried is the real thing, as far as the transfer goes: the same processes, permissions and digests. One probe at a time per
worker, so that its memory is bounded. Does not know how the order travels, nor what a result means to people.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from common.clock import Clock
from common.errors import HandshakeRefused, PdserveError
from common.types import KVLayout, Ticket, WorkerRef
from kvtransfer.receiver import KVReceiver
from kvtransfer.region import BlockRegion
from kvtransfer.sender import KVSender
from kvtransfer.state import Seal
from kvtransfer.transports.base import TransportOffer

LAYOUT = KVLayout("probe", "probe", 16, 4, 64, 32, "bfloat16", False)  # 512 KiB a block
NUM_BLOCKS = 32
ROUNDS = 5
TTL_S = 10.0


@dataclass(frozen=True, slots=True)
class ProbeOrder:
    """What the prefill worker is to do. Written by the decode worker."""

    decode_worker_id: str
    decode_incarnation: int
    offer: TransportOffer
    pool_blocks: int
    layout: KVLayout
    tickets: tuple[Ticket, ...]


@dataclass(frozen=True, slots=True)
class PushReport:
    """One ticket's transfer. Written by the prefill worker."""

    seal: Seal
    transfer_s: float  # time in which something was being written


@dataclass(frozen=True, slots=True)
class LinkReport:
    """What one kind of transport does between two workers. `error` None = it works."""

    kind: str
    error: PdserveError | None = None
    latency_s: float = 0.0  # a hand-off of one block, its control messages included; median
    bytes_per_s: float = 0.0  # while writing; median


Ask = Callable[[ProbeOrder], Awaitable[Sequence[PushReport]]]


class ProbeTarget:
    """The decode worker's side. One per worker."""

    def __init__(self, worker_id: str, incarnation: int, secret: bytes, clock: Clock) -> None:
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._secret = secret
        self._clock = clock
        self._turn = asyncio.Lock()

    async def measure(self, prefill: WorkerRef, kinds: Sequence[str], host: str, ask: Ask) -> list[LinkReport]:
        """One report per kind, in their order; errors are in the reports."""
        reports = []
        async with self._turn:
            for kind in kinds:
                try:
                    reports.append(await self._measure(prefill, kind, host, ask))
                except PdserveError as error:
                    reports.append(LinkReport(kind, error))
        return reports

    async def _measure(self, prefill: WorkerRef, kind: str, host: str, ask: Ask) -> LinkReport:
        region = BlockRegion.create_shared(LAYOUT.block_bytes, NUM_BLOCKS)
        receiver = KVReceiver(region, LAYOUT, self._worker_id, self._incarnation, self._secret, self._clock)
        try:
            # Whether the network may be trusted was decided when the worker itself began to listen there.
            (offer,) = await receiver.start([kind], host, trusted_network=True)
            latencies_s, rates = [], []
            for attempt in range(ROUNDS + 1):  # the first connects, and touches memory for the first time
                started_s = self._clock.monotonic_s()
                await self._hand_off(receiver, prefill, offer, ask, attempt, 1)
                latencies_s.append(self._clock.monotonic_s() - started_s)
                report = await self._hand_off(receiver, prefill, offer, ask, attempt, NUM_BLOCKS)
                rates.append(NUM_BLOCKS * LAYOUT.block_bytes / max(report.transfer_s, 1e-9))
        finally:
            await receiver.close()
            region.close()
        return LinkReport(kind, None, statistics.median(latencies_s[1:]), statistics.median(rates[1:]))

    async def _hand_off(
        self, receiver: KVReceiver, prefill: WorkerRef, offer: TransportOffer, ask: Ask, attempt: int, num_blocks: int
    ) -> PushReport:
        incoming = receiver.open(
            request_id="probe",
            attempt=attempt,
            prefill=prefill,
            first_block=0,
            blocks=range(num_blocks),
            num_tokens=num_blocks * LAYOUT.block_tokens,
            ttl_s=TTL_S,
        )
        order = ProbeOrder(self._worker_id, self._incarnation, offer, NUM_BLOCKS, LAYOUT, (incoming.ticket,))
        asked = asyncio.ensure_future(ask(order))
        failed = asyncio.ensure_future(incoming.wait_failed())
        try:
            await asyncio.wait({asked, failed}, return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                raise failed.result()
            (report,) = asked.result()
        finally:
            asked.cancel()
            failed.cancel()
        await incoming.complete(report.seal)
        return report


class ProbeSource:
    """The prefill worker's side. One per worker. Keeps a link open between the orders of one decode worker's probe."""

    def __init__(self, worker_id: str, incarnation: int, secret: bytes, clock: Clock) -> None:
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._secret = secret
        self._clock = clock
        self._turn = asyncio.Lock()
        self._offer: TransportOffer | None = None
        self._region: BlockRegion | None = None
        self._sender: KVSender | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def push(self, order: ProbeOrder) -> list[PushReport]:
        """Raises HandoffError: whatever is wrong with this link."""
        if order.layout != LAYOUT:
            raise HandshakeRefused("the two workers probe with different blocks: they run different versions", param="layout")
        async with self._turn:
            sender = await self._sender_for(order)
            await sender.connect(order.decode_worker_id, order.decode_incarnation, [order.offer], order.pool_blocks)
            reports = []
            for ticket in order.tickets:
                outgoing = sender.open(ticket)
                try:
                    await outgoing.push([(block, block) for block in range(len(ticket.blocks))])
                    account = await outgoing.finish()
                finally:
                    await outgoing.abort()
                reports.append(PushReport(Seal(ticket.nonce, ticket.num_tokens, account.digests), account.transfer_s))
            return reports

    async def close(self) -> None:
        async with self._turn:
            await self._end()
        if self._closing:
            await asyncio.wait(self._closing)

    async def _sender_for(self, order: ProbeOrder) -> KVSender:
        if self._idle is not None:
            self._idle.cancel()
        self._idle = asyncio.get_running_loop().call_later(TTL_S, self._end_soon)
        if self._sender is None or self._offer != order.offer:
            await self._end()
            self._offer = order.offer
            self._region = BlockRegion.create_shared(LAYOUT.block_bytes, NUM_BLOCKS)
            self._region.buffer[:] = os.urandom(self._region.buffer.nbytes)
            upper_halves = np.frombuffer(self._region.buffer, np.uint8)[1::2]
            upper_halves &= 0xBF  # small bfloat16 numbers, as KV is: some links carry only those
            self._sender = KVSender(self._region, LAYOUT, self._worker_id, self._incarnation, self._secret, self._clock)
        return self._sender

    def _end_soon(self) -> None:
        task = asyncio.get_running_loop().create_task(self._end_idle(), name="probe-end")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _end_idle(self) -> None:
        async with self._turn:
            await self._end()

    async def _end(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        sender, self._sender = self._sender, None
        region, self._region = self._region, None
        self._offer = None
        if sender is not None:
            await sender.close()
        if region is not None:
            region.close()
