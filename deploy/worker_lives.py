"""What was decided, done: starts workers, watches over each of them to its end, drains, stops and flips them, and tells of it.

    Start | Flip -> launched or taken over -> ready -> watched -> gone (told as a loss), or handed on to its successor
    Drain, Stop  -> through the worker first, and through its process if it does not answer in time

A worker is lost when its process ends, when it says that it failed, or when it is silent (`deploy.silence`); it is
killed before its next incarnation starts, so that two never live. A flip hands the process of one worker on to the next: the life
of the first ends without an end of its process. Nothing is decided here (`deploy.reconcile`), and it does not know Ray
(`deploy.worker_host`).
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from dataclasses import dataclass, field

import grpc.aio

from common.clock import Clock
from common.errors import ClusterError, ConfigError, ModelLoadError, PdserveError, WorkerLost
from common.logs import get_logger
from common.rpc import cancel_and_wait, connect, error_from_rpc
from common.types import WorkerRef
from common.wire.worker_pb2 import DrainRequest, InfoReply, InfoRequest
from common.wire.worker_pb2_grpc import WorkerStub
from common.worker import WorkerSpec
from deploy.activity import Activity, look_at, was_kept_waiting
from deploy.manager_spec import ManagerSpec
from deploy.pool_board import PoolBoard
from deploy.reconcile import Action, Drain, Flip, Loss, Phase, Start, Stop, became_drained, became_ready, lost
from deploy.silence import Silence
from deploy.worker_host import WorkerHost, WorkerProcess

log = get_logger(__name__)

_STOP_MARGIN_S = 2.0  # beyond the grace, before a worker that was asked to stop is killed
_PERMANENT = (ConfigError, ModelLoadError)  # the same start would fail again


@dataclass(slots=True)
class _Worker:
    """One incarnation, from launch to end."""

    worker_id: str
    incarnation: int
    process: WorkerProcess
    ref: WorkerRef | None = None
    channel: grpc.aio.Channel | None = None
    handed_on: asyncio.Event = field(default_factory=asyncio.Event)  # its process belongs to another worker now


class WorkerLives:
    def __init__(self, spec: ManagerSpec, host: WorkerHost, board: PoolBoard, clock: Clock) -> None:
        self._spec = spec
        self._models = {model.config.name: model for model in spec.models}
        self._host = host
        self._board = board
        self._clock = clock
        self._workers: dict[str, _Worker] = {}
        self._launching: dict[str, asyncio.Future[WorkerProcess]] = {}

    async def ask_all(self) -> None:
        """One health check of everybody, now; the reports go into the picture."""
        checks = [asyncio.create_task(self._answers(worker)) for worker in self._workers.values() if worker.ref is not None]
        if checks:
            await asyncio.wait(checks)  # not gather: a check whose worker is buried meanwhile ends cancelled

    async def perform(self, action: Action) -> None:
        match action:
            case Start():
                await self._live(action, None)
            case Flip():
                await self._live(action.successor, action)
            case Drain():
                await self._drain(action)
            case Stop():
                await self._stop(action)

    async def _live(self, start: Start, inherited: Flip | None) -> None:
        """A worker's whole life, in a new process or in that of the worker it follows. Ends when its process is gone, and tells
        why, or belongs to another worker."""
        worker_id, incarnation = start.worker_id, start.incarnation
        log.info("worker starting", worker=worker_id, incarnation=incarnation)
        permanent = False
        worker: _Worker | None = None
        try:
            spec = self._worker_spec(start)
            process = await self._launch(spec) if inherited is None else self._take_over(inherited)
            worker = self._workers[worker_id] = _Worker(worker_id, incarnation, process)
            if self._board.state.replicas[worker_id].phase is not Phase.STARTING:
                raise WorkerLost("stopped before it started")  # `_stop` came too early to find a process
            async with asyncio.timeout(self._spec.start_timeout_s):
                worker.ref = await (process.start() if inherited is None else process.become(spec))
            worker.channel = connect(worker.ref.address, self._spec.cluster_token)
            await self._answers(worker)
            self._board.tell(lambda state: became_ready(state, worker_id, incarnation, self._clock.monotonic_s()))
            log.info("worker ready", worker=worker_id, incarnation=incarnation, address=worker.ref.address)
            reason = await self._watch(worker)
            if not worker.handed_on.is_set():
                self._give_up(start, reason)
        except TimeoutError:
            reason = f"did not start within {self._spec.start_timeout_s:g} s"
        except PdserveError as error:
            reason, permanent = f"{error.code}: {error.message}", isinstance(error, _PERMANENT)
        finally:
            if worker is not None:
                await self._bury(worker)
        if worker is not None and worker.handed_on.is_set():
            log.info("worker flipped", worker=worker_id, incarnation=incarnation)
            return
        log.info("worker gone", worker=worker_id, incarnation=incarnation, reason=reason)
        loss = Loss(worker_id, incarnation, reason, permanent)
        self._board.tell(lambda state: lost(state, loss, self._clock.monotonic_s(), self._spec.restarts))

    def _give_up(self, start: Start, reason: str) -> None:
        """Nobody is to be sent there while it is being buried, which takes time if its host is not heard any more."""
        if self._board.state.replicas[start.worker_id].phase is Phase.READY:  # nobody asked it to end
            log.warning("worker given up", worker=start.worker_id, incarnation=start.incarnation, reason=reason)
        self._board.membership.give_up(start.worker_id, start.incarnation)
        self._board.publish()

    async def _launch(self, spec: WorkerSpec) -> WorkerProcess:
        """May wait long for room; `_stop` ends the wait."""
        launching = self._launching[spec.worker_id] = asyncio.ensure_future(self._host.launch(spec))
        try:
            await asyncio.wait({launching})
            if launching.cancelled():
                raise WorkerLost("stopped before it started")
            return launching.result()
        finally:
            launching.cancel()
            del self._launching[spec.worker_id]

    def _take_over(self, flip: Flip) -> WorkerProcess:
        """The process of a worker, which has none from now on. Raises WorkerLost."""
        worker = self._current(flip)
        if worker is None:
            raise WorkerLost("the process ended before it was another worker's")
        worker.handed_on.set()
        del self._workers[worker.worker_id]
        return worker.process

    async def _bury(self, worker: _Worker) -> None:
        if not worker.handed_on.is_set():
            await self._kill(worker)
        if worker.channel is not None:
            await worker.channel.close(None)
        if self._workers.get(worker.worker_id) is worker:
            del self._workers[worker.worker_id]

    async def _kill(self, worker: _Worker) -> None:
        """Returns when it is dead, for two incarnations must never live. A process that the kernel does not let go of, as on a
        machine that swaps, is asked again and holds up nobody but its successor."""
        while True:
            try:
                return await worker.process.kill()
            except ClusterError as error:  # it has waited
                log.error("worker cannot be killed yet", worker=worker.worker_id, reason=error.message)

    async def _watch(self, worker: _Worker) -> str:
        """Returns why the worker must be given up."""
        policy = self._spec.health
        ended = asyncio.create_task(worker.process.ended())
        handed_on = asyncio.create_task(worker.handed_on.wait())
        silence = Silence(policy, self._clock.monotonic_s())
        check: asyncio.Task[str] | None = None
        try:
            while True:
                over = {ended, handed_on} | ({check} if check else set())
                wait_s = None if check else silence.wait_s(self._clock.monotonic_s())
                await asyncio.wait(over, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                if handed_on.done():
                    return "handed on"
                if ended.done():
                    return ended.result()
                if check is None:
                    check = asyncio.create_task(self._check(worker, silence))
                    continue
                if reason := check.result():
                    return reason
                check = None
                self._board.publish()
        finally:
            for task in (handed_on, ended, check):
                if task is not None:
                    await cancel_and_wait(task)

    async def _check(self, worker: _Worker, silence: Silence) -> str:
        """One health check; why the worker must be given up, if it must. Whoever missed one is looked at during the next."""
        timeout_s = self._spec.health.timeout_s
        silence.asked(self._clock.monotonic_s())
        looking = asyncio.create_task(self._activity(worker, timeout_s)) if silence.suspicious else None
        try:
            if await self._answers(worker):
                silence.answered(self._clock.monotonic_s())
                return ""
            activity = await looking if looking else None
            return silence.missed(activity, self._clock.monotonic_s())
        finally:
            if looking is not None:
                await cancel_and_wait(looking)

    async def _activity(self, worker: _Worker, timeout_s: float) -> Activity:
        before = look_at(os.getpid())
        activity = Activity.UNHEARD
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                activity = await worker.process.activity(timeout_s / 2)
        if activity is Activity.UNHEARD and was_kept_waiting(before, look_at(os.getpid()), timeout_s):
            return Activity.UNSURE
        return activity

    async def _answers(self, worker: _Worker) -> bool:
        """One health check; its report goes into the picture."""
        if worker.channel is None or worker.ref is None:
            return False
        try:
            info: InfoReply = await WorkerStub(worker.channel).Info(InfoRequest(), timeout=self._spec.health.timeout_s)
        except grpc.aio.AioRpcError as error:
            log.debug("no answer", worker=worker.worker_id, error=error_from_rpc(error).code)
            return False
        if (info.worker_id, info.incarnation) != (worker.worker_id, worker.incarnation):
            return False  # somebody else took over the port of a process that is gone
        info.address = worker.ref.address
        self._board.membership.report(info)
        return True

    async def _drain(self, drain: Drain) -> None:
        worker = self._current(drain)
        if worker is not None and worker.channel is not None:
            timeout_s = self._spec.drain_timeout_s
            try:
                reply = await WorkerStub(worker.channel).Drain(
                    DrainRequest(timeout_s=timeout_s), timeout=timeout_s + _STOP_MARGIN_S
                )
                log.info("worker drained", worker=drain.worker_id, complete=reply.drained)
            except grpc.aio.AioRpcError as error:
                log.warning("worker did not drain", worker=drain.worker_id, error=error_from_rpc(error).code)
        self._board.tell(lambda state: became_drained(state, drain.worker_id, drain.incarnation))

    async def _stop(self, stop: Stop) -> None:
        """The end itself is seen, and told, by `_live`."""
        worker = self._current(stop)
        if worker is None:
            launching = self._launching.get(stop.worker_id)
            if launching is not None:
                launching.cancel()
            return
        if worker.ref is not None:
            try:
                async with asyncio.timeout(self._spec.stop_grace_s + _STOP_MARGIN_S):
                    await worker.process.stop(self._spec.stop_grace_s)
            except (TimeoutError, PdserveError) as error:
                log.warning("worker did not stop by itself", worker=stop.worker_id, error=type(error).__name__)
        await worker.process.kill()

    def _current(self, action: Drain | Stop | Flip) -> _Worker | None:
        worker = self._workers.get(action.worker_id)
        return worker if worker is not None and worker.incarnation == action.incarnation else None

    def _worker_spec(self, start: Start) -> WorkerSpec:
        model = self._models[start.pool.model]
        return WorkerSpec(
            worker_id=start.worker_id,
            incarnation=start.incarnation,
            role=start.pool.role,
            model=model.config,
            model_path=model.path,
            transfer=self._spec.transfer,
            cluster_token=self._spec.cluster_token,
            host=self._spec.host,
            trusted_network=self._spec.trusted_network,
            threads=model.threads,
            cores_file=self._spec.cores_file if model.config.engine.threads is None else "",
            logging=self._spec.logging,
            tracing=self._spec.tracing,
        )
