"""The prefill workers that this decode worker has met, and one handshake with each incarnation of them.

    to(ref) -> PrefillLink ── shake_hands(link): once; shared by all who need it, given up when nobody waits any more
                           └─ link.failed(): whatever went wrong, shake hands again before the next ticket

A later incarnation replaces an earlier one, and none comes back. Knows the messages of a handshake, not what they say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass

from common.errors import HandshakeRefused, TransferBroken, WorkerLost
from common.logs import get_logger
from common.types import WorkerRef
from common.wire import worker_pb2
from decode_worker.prefill_peer import ConnectPrefill, PrefillPeer

Spawn = Callable[[Coroutine[None, None, None]], "asyncio.Task[None]"]

_log = get_logger(__name__)


@dataclass(slots=True)
class PrefillLink:
    """To one incarnation."""

    ref: WorkerRef
    rpc: PrefillPeer
    transport: str = ""  # "" until the handshake succeeded
    degrees: tuple[int, int] = (1, 1)  # of its ranks: tensor, pipeline
    handshake: asyncio.Task[None] | None = None  # the one that is under way, for all who need it
    num_waiting: int = 0  # for it
    num_transfers: int = 0  # that were verified
    num_failures: int = 0
    transferred_bytes: int = 0

    def succeeded(self, size_bytes: int) -> None:
        self.num_transfers += 1
        self.transferred_bytes += size_bytes

    def failed(self) -> None:
        self.num_failures += 1
        self.transport = ""


class PrefillLinks:
    def __init__(
        self,
        connect: ConnectPrefill,
        introduction: Callable[[], worker_pb2.HandshakeRequest],
        prepare_ranks: Callable[[], Awaitable[None]],
        timeout_s: float,
        spawn: Spawn,
    ) -> None:
        """Once `prepare_ranks` has returned an introduction has the offers of all ranks. `timeout_s` is of a handshake; `spawn`
        begins a task that somebody waits for in the end."""
        self._connect = connect
        self._introduction = introduction
        self._prepare_ranks = prepare_ranks
        self._timeout_s = timeout_s
        self._spawn = spawn
        self.known: dict[str, PrefillLink] = {}  # by worker, in the order in which they were met

    def to(self, ref: WorkerRef) -> PrefillLink:
        """Raises HandshakeRefused for an incarnation that is over."""
        known = self.known.get(ref.worker_id)
        if known is not None and known.ref == ref:
            return known
        if known is not None:
            if known.ref.incarnation > ref.incarnation:
                raise HandshakeRefused("a later incarnation of this prefill worker is known", param="incarnation")
            self._spawn(known.rpc.close())
        link = self.known[ref.worker_id] = PrefillLink(ref, self._connect(ref))
        return link

    async def shake_hands(self, link: PrefillLink) -> None:
        """One at a time per link, with one budget, shared by all who wait for it: its failure is the failure of each. It is given
        up when the last of them no longer waits."""
        if link.transport:
            return
        shared = link.handshake
        if shared is None or shared.done():
            shared = link.handshake = self._spawn(self._handshake(link))
        link.num_waiting += 1
        try:
            await asyncio.shield(shared)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise TransferBroken("this worker's KV transfer is closed") from None  # it is the shared one that was cancelled
        finally:
            link.num_waiting -= 1
            if link.num_waiting == 0 and link.handshake is not None:
                link.handshake.cancel()  # of no effect if it is done
                link.handshake = None

    def uses(self) -> tuple[worker_pb2.LinkUse, ...]:
        """What came over each."""
        return tuple(
            worker_pb2.LinkUse(
                prefill_worker_id=link.ref.worker_id,
                prefill_incarnation=link.ref.incarnation,
                transport=link.transport,
                transfers=link.num_transfers,
                failures=link.num_failures,
                bytes=link.transferred_bytes,
            )
            for link in self.known.values()
        )

    async def close(self) -> None:
        for link in self.known.values():
            if link.handshake is not None:
                link.handshake.cancel()
            await link.rpc.close()
        self.known.clear()

    async def _handshake(self, link: PrefillLink) -> None:
        reply = await link.rpc.handshake(self._introduction(), self._timeout_s)
        if not reply.transport and reply.prefill_incarnation == link.ref.incarnation:  # it has several ranks
            await self._prepare_ranks()
            reply = await link.rpc.handshake(self._introduction(), self._timeout_s)
        if reply.prefill_worker_id == link.ref.worker_id and reply.prefill_incarnation > link.ref.incarnation:
            raise WorkerLost("the prefill worker was replaced by a later incarnation")  # another try may know of it
        if (reply.prefill_worker_id, reply.prefill_incarnation) != (link.ref.worker_id, link.ref.incarnation):
            raise HandshakeRefused("another worker answers at this address", param="prefill_worker_id")
        if not reply.transport:
            raise HandshakeRefused("the prefill worker asks for offers of ranks again", param="ranks")
        link.degrees = reply.tensor_parallel or 1, reply.pipeline_parallel or 1
        link.transport = reply.transport
        _log.info("linked", prefill=link.ref.worker_id, incarnation=link.ref.incarnation, transport=reply.transport)
