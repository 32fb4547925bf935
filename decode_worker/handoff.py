"""Where the decode worker's engine meets KV transfer: reserved blocks are filled elsewhere, verified, and only then used.

    fetch(wanted, report):
      1. handshake with the prefill worker, once per pair of incarnations: layouts that go together, one data link
      2. open a transfer: a ticket for the reserved blocks
      3. Prefill.Run(request, ticket), raced against the transfer's own failure
      4. complete(seal): every block arrived and bears the digest that was sealed
      -> reports RemotePrefill, or one typed error; then the blocks come back through `on_drained` when no writer can touch them

A fetch that failed, or was cancelled, leaves nothing half done for its caller: it drains in the background. Where either worker
has several ranks there is a ticket, a link and a seal for each two of them that share something, and all of them are one hand-off
(`kvtransfer.ranks`). This file and its twin in `prefill_worker` are the only ones that know both the engine and the transfer.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypedDict

from common.clock import Clock
from common.codec import (
    error_to_wire,
    layout_to_wire,
    request_to_wire,
    sampled_token_from_wire,
    ticket_to_wire,
    token_logprob_from_wire,
)
from common.config import TransferConfig
from common.engine.heads.rows import HiddenRow
from common.errors import EngineFailure, HandoffError, PdserveError, SealMismatch, TransferBroken, WorkerLost
from common.logs import get_logger
from common.metrics import LeaseReadings
from common.tracing.span import Kind, Span, Value, current_span, within
from common.types import KVLayout, Request, StageTimings, Ticket, TokenLogprob, WorkerRef
from common.wire import worker_pb2
from common.worker import WorkerSpec
from decode_worker.events import RemotePrefill, RemotePrefillWanted
from decode_worker.prefill_links import PrefillLink, PrefillLinks
from decode_worker.prefill_peer import ConnectPrefill
from kvtransfer import PROTOCOL_VERSION
from kvtransfer.device import region_of_pool
from kvtransfer.probe import ProbeOrder, ProbeTarget, PushReport
from kvtransfer.ranks.orders import RankOrders
from kvtransfer.ranks.parts import Degrees, window_of
from kvtransfer.ranks.rank_end import Introduction, ListenOrder, RankEnd
from kvtransfer.ranks.rank_receivers import GroupIncoming, RankReceivers
from kvtransfer.receiver import Incoming, KVReceiver
from kvtransfer.region import BlockRegion, PoolMemory
from kvtransfer.state import Seal
from kvtransfer.ticket import derive_secret
from kvtransfer.transports import LOSSY, TRANSPORTS, create_transport
from kvtransfer.transports.base import TransportOffer

_log = get_logger(__name__)
__all__ = ["DecodeHandoff", "MakeReceiver", "PoolMemory", "region_of_pool"]

_REASON_S = 0.25  # in which a writer that stopped says why


class MakeReceiver(Protocol):
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
    ) -> KVReceiver: ...


class _Named(TypedDict):
    """What tickets are made of, whoever makes them."""

    request_id: str
    attempt: int
    prefill: WorkerRef
    first_block: int
    blocks: Sequence[int]
    num_tokens: int
    ttl_s: float


@dataclass(slots=True)
class _Progress:
    """How far a fetch has come; what must be undone if it does not succeed."""

    wanted: RemotePrefillWanted
    link: PrefillLink | None = None
    incoming: Incoming | GroupIncoming | None = None
    succeeded: bool = False


class DecodeHandoff:
    """One per worker; lives on its asyncio loop. `on_drained` gets the blocks of every fetch that did not succeed, once."""

    def __init__(
        self,
        spec: WorkerSpec,
        layout: KVLayout,
        region: BlockRegion,
        clock: Clock,
        *,
        connect: ConnectPrefill,
        on_drained: Callable[[tuple[int, ...]], None],
        make_receiver: MakeReceiver = KVReceiver,
        ranks: Sequence[socket.socket] = (),
    ) -> None:
        """`region` is this process's; `ranks` lead to the worker's other ranks, and `layout` is that of blocks of all of them."""
        self._spec = spec
        self._config: TransferConfig = spec.transfer
        self._layout = layout
        self._region = region
        self._clock = clock
        self._on_drained = on_drained
        secret = derive_secret(spec.cluster_token)
        self._degrees = Degrees(spec.parallel.tensor_parallel, spec.parallel.pipeline_parallel)
        own = window_of(layout, self._degrees, 0)
        self._receiver = make_receiver(
            region, own, spec.worker_id, spec.incarnation, secret, clock, lease_s=spec.transfer.lease_s
        )
        self._ranks = RankReceivers(
            [RankEnd(region, clock), *(RankOrders(end, rank) for rank, end in enumerate(ranks, 1))],
            self._degrees,
            Introduction(spec.worker_id, spec.incarnation, secret, layout, spec.transfer.lease_s),
            clock,
        )
        self._probes = ProbeTarget(spec.worker_id, spec.incarnation, secret, clock)
        self._offers: list[TransportOffer] = []
        self._rank_offers: list[list[TransportOffer]] = []  # by rank, once somebody has asked for them
        self._background: set[asyncio.Task[None]] = set()
        self._links = PrefillLinks(
            connect, self._introduction, self._prepare_ranks, spec.transfer.handshake_timeout_s, self._spawn
        )

    def leases(self) -> LeaseReadings:
        """From any thread."""
        return self._receiver.leases() + self._ranks.leases()

    @property
    def num_blocks_arriving(self) -> int:
        """Held by requests whose KV is under way; those in quarantine are not."""
        return self._receiver.num_blocks_arriving + self._ranks.num_blocks_arriving

    def link_uses(self) -> tuple[worker_pb2.LinkUse, ...]:
        """What came from each prefill worker that is known, in the order in which they were met."""
        return self._links.uses()

    async def start(self) -> None:
        if self._degrees.num_ranks > 1:
            await self._prepare_ranks()
            return
        self._offers = await self._receiver.start(
            self._config.transports, self._spec.host, trusted_network=self._spec.trusted_network
        )

    async def settle(self, timeout_s: float) -> None:
        """Returns when no hand-off is under way nor being given up, or when the time is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._background:
                    await asyncio.wait(self._background)
                    await asyncio.sleep(0)  # what ends one may begin another

    async def close(self) -> None:
        """Ends all links. The memory stays with whoever keeps the engine."""
        await self._receiver.close()
        await self._ranks.close()
        await self._links.close()
        if self._background:
            await asyncio.wait(self._background)

    def fetch(self, wanted: RemotePrefillWanted, report: Callable[[RemotePrefill | PdserveError], None]) -> asyncio.Task[None]:
        """Starts a hand-off. `report` is called once with its outcome, also if the task is cancelled."""
        progress = _Progress(wanted)
        task = asyncio.get_running_loop().create_task(self._fetch(progress, report), name="fetch")

        def ended(task: asyncio.Task[None]) -> None:
            # Here and not in the task: one that is cancelled before it ran at all owns blocks too.
            self._background.discard(task)
            if progress.succeeded:
                return
            if task.cancelled():
                report(WorkerLost("the hand-off was given up"))
            elif task.exception() is not None:
                report(EngineFailure(f"the hand-off failed: {type(task.exception()).__name__}"))
            self._spawn(self._drain(progress))

        self._background.add(task)
        task.add_done_callback(ended)
        return task

    async def probe(self, ref: WorkerRef) -> worker_pb2.PeerReport:
        """Whether hand-offs from this prefill worker work, and how well each kind of link would do."""
        report = worker_pb2.PeerReport(prefill_worker_id=ref.worker_id)
        link = self._links.to(ref)
        try:
            await self._links.shake_hands(link)
            report.transport = link.transport
        except PdserveError as error:
            report.refused.CopyFrom(error_to_wire(error))

        async def ask(order: ProbeOrder) -> list[PushReport]:
            message = worker_pb2.PushProbeRequest(
                decode_worker_id=order.decode_worker_id,
                decode_incarnation=order.decode_incarnation,
                offer=worker_pb2.TransportOffer(kind=order.offer.kind, address=order.offer.address),
                pool_blocks=order.pool_blocks,
                layout=layout_to_wire(order.layout),
                tickets=[ticket_to_wire(ticket) for ticket in order.tickets],
            )
            reply = await link.rpc.push_probe(message, self._config.handshake_timeout_s)
            return [PushReport(_seal(account), account.transfer_s) for account in reply.accounts]

        configured = self._config.transports
        others = (kind for kind in TRANSPORTS if kind not in (*configured, "inproc", *LOSSY))
        # What this pool's memory rules out is never offered, so there is nothing to try.
        kinds = [kind for kind in (*configured, *others) if create_transport(kind).can_serve(self._region)]
        for found in await self._probes.measure(ref, kinds, self._spec.host, ask):
            report.links.add(
                kind=found.kind,
                configured=found.kind in configured,
                error=None if found.error is None else error_to_wire(found.error),
                latency_s=found.latency_s,
                bytes_per_s=found.bytes_per_s,
            )
        return report

    async def _fetch(self, progress: _Progress, report: Callable[[RemotePrefill | PdserveError], None]) -> None:
        try:
            ready = await self._obtain(progress)
        except PdserveError as error:
            if progress.link is not None:
                progress.link.failed()
            report(error)
        else:
            # No await between the last one of the hand-off and here: an abort comes before both, or after both.
            progress.succeeded = True
            if progress.link is not None:
                progress.link.succeeded(ready.timings.transfer_bytes)
            report(ready)

    async def _obtain(self, progress: _Progress) -> RemotePrefill:
        wanted = progress.wanted
        link = progress.link = self._links.to(wanted.prefill)
        await self._links.shake_hands(link)
        incoming = progress.incoming = self._open(link, wanted)
        if isinstance(incoming, GroupIncoming):
            await incoming.expect()
        attributes: dict[str, Value] = {"pdserve.prefill_worker": wanted.prefill.worker_id, "pdserve.attempt": wanted.attempt}
        with within(current_span().child("remote prefill", kind=Kind.CLIENT, attributes=attributes)) as span:
            return await self._run(link, incoming, wanted, span)

    def _open(self, link: PrefillLink, wanted: RemotePrefillWanted) -> Incoming | GroupIncoming:
        named: _Named = {
            "request_id": wanted.request.request_id,
            "attempt": wanted.attempt,
            "prefill": wanted.prefill,
            "first_block": wanted.first_block,
            "blocks": wanted.blocks,
            "num_tokens": wanted.request.num_prompt_tokens,
            "ttl_s": min(self._config.ticket_ttl_s, wanted.request.timeout_s),
        }
        giving = Degrees(*link.degrees)
        if giving.num_ranks == self._degrees.num_ranks == 1:
            return self._receiver.open(**named)
        return self._ranks.open(**named, giving=giving)

    async def _run(
        self, link: PrefillLink, incoming: Incoming | GroupIncoming, wanted: RemotePrefillWanted, span: Span
    ) -> RemotePrefill:
        started_s = self._clock.monotonic_s()
        first, *others = _tickets(incoming)
        message = worker_pb2.PrefillRequest(
            request=request_to_wire(wanted.request),
            ticket=ticket_to_wire(first),
            wants_row=wanted.wants_row,
            rank_tickets=[ticket_to_wire(ticket) for ticket in others],
        )
        run = asyncio.ensure_future(link.rpc.run(message, incoming.ticket.ttl_s))
        failed = asyncio.ensure_future(incoming.wait_failed())
        try:
            await asyncio.wait({run, failed}, return_when=asyncio.FIRST_COMPLETED)
            if not run.done() and isinstance(failed.result(), TransferBroken):
                # Who stops writing answers as well, on another connection, and that tells why.
                await asyncio.wait({run}, timeout=_REASON_S)
            if not run.done():
                raise failed.result()
            reply = run.result()
        finally:
            run.cancel()
            failed.cancel()
        replied_s = self._clock.monotonic_s()
        if isinstance(incoming, GroupIncoming):
            await incoming.complete(_seals(reply))
        else:
            await incoming.complete(_seal(reply))
        verify_s = self._clock.monotonic_s() - replied_s
        num_blocks = len(incoming.ticket.blocks)
        transfer = span.child(
            "transfer",  # what the computation did not hide
            start_s=max(started_s, replied_s - reply.tail_s),
            attributes={
                "pdserve.transport": link.transport,
                "pdserve.blocks": num_blocks,
                "pdserve.bytes": num_blocks * self._layout.block_bytes,
            },
        )
        transfer.end()
        return self._account(link, incoming, wanted.request, reply, replied_s - started_s, verify_s)

    def _account(
        self,
        link: PrefillLink,
        incoming: Incoming | GroupIncoming,
        request: Request,
        reply: worker_pb2.PrefillReply,
        run_s: float,
        verify_s: float,
    ) -> RemotePrefill:
        if len(reply.first_tokens) != request.num_choices:
            raise SealMismatch(f"{len(reply.first_tokens)} first tokens for {request.num_choices} choices")
        logprobs = tuple(_present(token_logprob_from_wire(item)) for item in reply.prompt_logprobs)
        wanted = request.num_prompt_tokens - 1 if request.sampling.prompt_logprobs is not None else 0
        if len(logprobs) != wanted:
            raise SealMismatch(f"{len(logprobs)} prompt log-probabilities, {wanted} were asked for")
        exposed_s = reply.tail_s + verify_s
        num_blocks = len(incoming.ticket.blocks)
        # Prompt tokens that were found in a cache on either side. The decode side's own share is counted by the scheduler;
        # what the prefill worker found beyond that is new.
        local_tokens = incoming.ticket.first_block * self._layout.block_tokens
        return RemotePrefill(
            first_tokens=tuple(sampled_token_from_wire(token) for token in reply.first_tokens),
            prompt_logprobs=logprobs,
            cached_tokens=max(0, reply.cached_tokens - local_tokens),
            row=HiddenRow.from_bytes(reply.row) if reply.row else None,
            work_s=reply.work_s,
            work_tokens=max(0, request.num_prompt_tokens - reply.cached_tokens),
            timings=StageTimings(
                prefill_queue_s=reply.queue_s,
                prefill_s=reply.prefill_s,
                transfer_exposed_s=exposed_s,
                rpc_s=max(0.0, run_s - reply.queue_s - reply.prefill_s - reply.tail_s),
                transfer_hidden_s=max(0.0, reply.transfer_s - exposed_s),
                prefill_worker=link.ref.worker_id,
                transport=link.transport,
                transfer_bytes=num_blocks * self._layout.block_bytes,
                transfer_blocks=num_blocks,
            ),
        )

    def _introduction(self) -> worker_pb2.HandshakeRequest:
        return worker_pb2.HandshakeRequest(
            protocol_version=PROTOCOL_VERSION,
            decode_worker_id=self._spec.worker_id,
            decode_incarnation=self._spec.incarnation,
            layout=layout_to_wire(self._layout),
            offers=_offers_to_wire(self._offers),
            pool_blocks=self._region.num_blocks,
            tensor_parallel=self._degrees.tensor_parallel,
            pipeline_parallel=self._degrees.pipeline_parallel,
            ranks=[worker_pb2.RankOffers(offers=_offers_to_wire(offers)) for offers in self._rank_offers],
        )

    async def _prepare_ranks(self) -> None:
        spec = self._spec
        listen = ListenOrder(tuple(self._config.transports), spec.host, spec.trusted_network)
        self._rank_offers = await self._ranks.start(listen)

    async def _drain(self, progress: _Progress) -> None:
        link, incoming = progress.link, progress.incoming
        if link is not None and incoming is not None:

            async def release() -> None:
                message = worker_pb2.ReleaseRequest(nonces=[ticket.nonce for ticket in _tickets(incoming)])
                await link.rpc.release(message, self._config.release_timeout_s)

            try:
                await incoming.abandon(release, timeout_s=self._config.release_timeout_s)
            except HandoffError as error:
                _log.warning("blocks are not given back", reason=error.message, blocks=len(progress.wanted.blocks))
                return  # a rank was lost: this worker ends
        self._on_drained(progress.wanted.blocks)

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


def _tickets(incoming: Incoming | GroupIncoming) -> tuple[Ticket, ...]:
    return incoming.tickets if isinstance(incoming, GroupIncoming) else (incoming.ticket,)


def _offers_to_wire(offers: Iterable[TransportOffer]) -> list[worker_pb2.TransportOffer]:
    return [worker_pb2.TransportOffer(kind=offer.kind, address=offer.address) for offer in offers]


def _seal(reply: worker_pb2.PrefillReply) -> Seal:
    return Seal(nonce=reply.nonce, num_tokens=reply.num_tokens, digests=_digests(reply.digests))


def _seals(reply: worker_pb2.PrefillReply) -> dict[bytes, Seal]:
    """By nonce; of all pairs of ranks."""
    more = {seal.nonce: Seal(seal.nonce, reply.num_tokens, _digests(seal.digests)) for seal in reply.rank_seals}
    return {reply.nonce: _seal(reply), **more}


def _digests(blocks: Iterable[worker_pb2.BlockDigest]) -> dict[int, bytes]:
    return {block.logical_block: block.digest for block in blocks}


def _present(value: TokenLogprob | None) -> TokenLogprob:
    if value is None:
        raise SealMismatch("a prompt log-probability is missing")
    return value
