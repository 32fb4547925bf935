"""One watch per worker: what it reports goes to placement, in order and without a gap, or not at all.

    a worker is in the snapshot -> connect -> whole picture, change, change ... -> broken, silent, a gap -> back-off -> connect
                                                                                      `-> placement is told that it is blind there

Without a watch, what this router sent to a worker is what is known of its load. One that gives no reports is asked again later.
"""

from __future__ import annotations

import asyncio
import random

import grpc.aio

from common.codec import report_from_wire
from common.config import PlacementConfig
from common.errors import PdserveError, WorkerLost
from common.logs import get_logger
from common.metrics import RouterMetrics
from common.rpc import cancel_and_wait, error_from_rpc
from common.types import WorkerRef, WorkerState
from common.wire import worker_pb2
from common.wire.worker_pb2_grpc import WorkerStub
from router.links import Links
from router.placement.placer import Placer
from router.registry import Registry

log = get_logger(__name__)

_BACKOFF_FIRST_S, _BACKOFF_LAST_S = 0.1, 10.0
_SNAPSHOT_S = 10.0  # waiting for news of the membership; it comes earlier when there is some
_REPORTS_PER_S = 2000.0  # of all workers together: what one router can take in beside its work


class Watching:
    """`run` is one task for as long as the router lives."""

    def __init__(
        self,
        config: PlacementConfig,
        registry: Registry,
        placer: Placer,
        *,
        cluster_token: str,
        connect_timeout_s: float,
        router_id: str,
        metrics: RouterMetrics,
    ) -> None:
        self._config = config
        self._registry = registry
        self._placer = placer
        self._router_id = router_id
        self._metrics = metrics
        self._links = Links(cluster_token=cluster_token, connect_timeout_s=connect_timeout_s)
        self._watches: dict[WorkerRef, asyncio.Task[None]] = {}
        self._reporting: set[WorkerRef] = set()

    async def run(self) -> None:
        """Ends only by cancellation."""
        try:
            while True:
                view = self._registry.view
                self._placer.sync(view.workers)
                wanted = {one.ref for one in view.workers if one.state in (WorkerState.READY, WorkerState.DRAINING)}
                for ref in [ref for ref in self._watches if ref not in wanted]:
                    await cancel_and_wait(self._watches.pop(ref))
                for ref in wanted:
                    if ref not in self._watches:
                        self._watches[ref] = asyncio.create_task(self._watch_for_ever(ref), name="watch worker")
                await self._links.keep_only(view.refs())
                if self._registry.view is view:
                    await self._registry.wait_changed(_SNAPSHOT_S)
        finally:
            for task in self._watches.values():
                await cancel_and_wait(task)
            await self._links.close()

    async def _watch_for_ever(self, ref: WorkerRef) -> None:
        backoff_s = _BACKOFF_FIRST_S
        told = False
        while True:
            reason = "a report is missing"
            try:
                await self._watch(ref)
            except TimeoutError:
                reason = "nothing reported in time"
            except PdserveError as error:
                reason = error.code
            if ref in self._reporting:
                backoff_s, told = _BACKOFF_FIRST_S, False
                self._reporting.discard(ref)
                self._metrics.watched_workers.set(len(self._reporting))
            self._placer.break_off(ref)
            if not told:
                log.info("worker does not report", worker=ref.worker_id, incarnation=ref.incarnation, reason=reason)
                told = True
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, _BACKOFF_LAST_S)

    async def _watch(self, ref: WorkerRef) -> None:
        """Returns when a report is missing."""
        async with self._links.to(ref) as channel:
            interval_s = max(self._config.report_interval_s, len(self._watches) / _REPORTS_PER_S)
            call = WorkerStub(channel).Watch(worker_pb2.WatchLoadRequest(router_id=self._router_id, interval_s=interval_s))
            try:
                reports = aiter(call)
                while True:
                    async with asyncio.timeout(self._config.report_timeout_s + interval_s):
                        message = await anext(reports, None)
                    if message is None:
                        raise WorkerLost("the worker ended its reports")
                    if not self._placer.report(ref, report_from_wire(message)):
                        return
                    self._reporting.add(ref)
                    self._metrics.watched_workers.set(len(self._reporting))
                    self._metrics.known_blocks.set(len(self._placer.fleet.index))
            except grpc.aio.AioRpcError as error:
                raise error_from_rpc(error) from None
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                raise WorkerLost("the worker ended its reports") from None
            finally:
                call.cancel()
