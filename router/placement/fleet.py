"""All workers of all models, in the order in which a decision looks at them.

    Fleet ── Pool(model, role) ── Worker, Worker, ...      kept sorted: the one that will be free first stands first
        └── PrefixIndex, one for all

Every change of a worker moves it in its pool's order (a bisection), so that a decision looks at a few workers instead of all:
the first ones of the order, and the first of each group that holds the same part of the prompt. The order of a prefill pool is by
`free_at_s`, that of a decode pool by the predicted time of a step; equal ones in the order in which they were last used.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from operator import itemgetter

from common.load import WorkerReport
from common.types import Role, WorkerRef, WorkerState
from router.placement.index import PrefixIndex
from router.placement.membership import WorkerView
from router.placement.predictors import HandoffModel
from router.placement.worker import Charge, Worker

_SLOT = itemgetter(2)
_LEARNT_STEPS = 8  # of a worker, before its model is more than a prior


class Pool:
    """The ready workers of one role of one model."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.by_slot: dict[int, Worker] = {}
        self.bits = 0
        self.unlearnt: set[int] = set()  # slots of workers whose predictor has seen too little
        self._taught_samples = 0
        self._order: list[tuple[float, int, int]] = []  # keys; the last part is the slot

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Worker]:
        """Least loaded first."""
        return map(self.by_slot.__getitem__, map(_SLOT, self._order))

    def add(self, worker: Worker) -> None:
        self.by_slot[worker.slot] = worker
        self.bits |= 1 << worker.slot
        if worker.steps.num_samples < _LEARNT_STEPS:
            self.unlearnt.add(worker.slot)
        worker.key = self._key(worker)
        insort(self._order, worker.key)

    def remove(self, worker: Worker) -> None:
        del self._order[bisect_left(self._order, worker.key)]
        del self.by_slot[worker.slot]
        self.bits &= ~(1 << worker.slot)
        self.unlearnt.discard(worker.slot)

    def teach(self, teacher: Worker) -> None:
        """Workers that have shown too little are taken for as fast as this one: nobody would ever try them otherwise."""
        if teacher.steps.num_samples >= _LEARNT_STEPS:
            self.unlearnt.discard(teacher.slot)
        if teacher.steps.num_samples < 2 * self._taught_samples:
            return  # little that was not taught before
        self._taught_samples = teacher.steps.num_samples
        for slot in tuple(self.unlearnt):
            worker = self.by_slot[slot]
            if worker.steps.num_samples < teacher.steps.num_samples:
                worker.steps.start_from(teacher.steps)
                self.move(worker)

    def move(self, worker: Worker) -> None:
        """After anything about it has changed."""
        if self.by_slot.get(worker.slot) is not worker:
            return
        key = self._key(worker)
        if key != worker.key:
            del self._order[bisect_left(self._order, worker.key)]
            worker.key = key
            insort(self._order, key)

    def num_busy(self, now_s: float) -> int:
        """Of a prefill pool: workers that still have prompts to compute."""
        return len(self._order) - bisect_left(self._order, (now_s + 1e-9,))

    def _key(self, worker: Worker) -> tuple[float, int, int]:
        worker.settle()
        if self.role is Role.PREFILL:
            return (worker.free_at_s, worker.last_used, worker.slot)
        step_s = worker.step_s
        # Waiting for room is worse than any slow step; without reports only our own dispatches tell workers apart.
        return (step_s * (1.0 + worker.load.waiting) + 1e-9 * worker.kv_tokens, worker.last_used, worker.slot)


class Fleet:
    def __init__(self, *, max_blocks: int, speculative_ttl_s: float) -> None:
        self.index = PrefixIndex(max_blocks=max_blocks, speculative_ttl_s=speculative_ttl_s)
        self.workers: dict[WorkerRef, Worker] = {}
        self._pools: dict[tuple[str, Role], Pool] = {}
        self._handoffs: dict[str, HandoffModel] = {}
        self._absent: frozenset[WorkerRef] = frozenset()  # gone, but something of ours runs there
        self._serial = 0

    def pool(self, model: str, role: Role) -> Pool:
        pool = self._pools.get((model, role))
        if pool is None:
            pool = self._pools[model, role] = Pool(role)
        return pool

    def handoff(self, model: str) -> HandoffModel:
        return self._handoffs.setdefault(model, HandoffModel())

    # -- membership ----------------------------------------------------------------------------------------------------

    def sync(self, views: Sequence[WorkerView]) -> None:
        """Takes a snapshot over. Who is not ready takes no part; who is gone is forgotten once nothing of ours runs there."""
        present = {view.ref: view for view in views}
        for ref, worker in list(self.workers.items()):
            view = present.get(ref)
            if view is None and not worker.num_open:
                self._forget(worker)
            elif view is None or view.state is not WorkerState.READY:
                self._leave(worker)
        for ref, view in sorted(present.items(), key=lambda item: item[0].worker_id):
            if view.state is WorkerState.READY:
                worker = self.workers.get(ref) or self._new(view)
                pool = self.pool(worker.model, worker.role)
                if worker.slot not in pool.by_slot:
                    pool.add(worker)
        self._absent = frozenset(self.workers) - frozenset(present)

    def _new(self, view: WorkerView) -> Worker:
        worker = Worker(view.ref, view.role, view.model, self.index.add())
        siblings = [other for other in self.workers.values() if other.model == view.model]
        same_role = [other for other in siblings if other.role is view.role]
        teacher = max(same_role or siblings, key=lambda other: other.steps.num_samples, default=None)
        if teacher is not None and teacher.steps.num_samples >= _LEARNT_STEPS:
            worker.steps.start_from(teacher.steps)
        self.workers[view.ref] = worker
        return worker

    def _leave(self, worker: Worker) -> None:
        pool = self.pool(worker.model, worker.role)
        if pool.by_slot.get(worker.slot) is worker:
            pool.remove(worker)

    def _forget(self, worker: Worker) -> None:
        self._leave(worker)
        self.index.drop(worker.slot)
        del self.workers[worker.ref]

    # -- what changes a worker -----------------------------------------------------------------------------------------

    def report(self, ref: WorkerRef, report: WorkerReport, now_s: float) -> bool:
        """Takes a report over. False: one before it is missing, and only a whole picture helps."""
        worker = self.workers.get(ref)
        if worker is None:
            return True
        if report.shape is not None:
            self._new_slot(worker)
        elif not worker.reporting or report.sequence > worker.sequence + 1:
            self.break_off(ref)
            return False
        if worker.report(report, now_s):
            self.index.apply(worker.slot, report.registered, report.evicted)
            pool = self.pool(worker.model, worker.role)
            pool.move(worker)
            if report.steps and pool.unlearnt:
                pool.teach(worker)
        return True

    def break_off(self, ref: WorkerRef) -> None:
        """No report comes from there any more: its load is what we sent there, and what it caches is not known."""
        worker = self.workers.get(ref)
        if worker is not None and worker.reporting:
            self._new_slot(worker)
            worker.break_off()
            self.pool(worker.model, worker.role).move(worker)

    def open(self, ref: WorkerRef, dispatch_id: int, charge: Charge, now_s: float) -> None:
        worker = self.workers.get(ref)
        if worker is not None:
            self._serial += 1
            worker.last_used = self._serial
            worker.dispatches += 1
            worker.open(dispatch_id, charge, now_s)
            self.pool(worker.model, worker.role).move(worker)

    def prefilled(self, ref: WorkerRef, dispatch_id: int, now_s: float) -> None:
        worker = self.workers.get(ref)
        if worker is not None:
            worker.prefilled(dispatch_id, now_s)
            self.pool(worker.model, worker.role).move(worker)

    def close(self, ref: WorkerRef, dispatch_id: int, now_s: float) -> None:
        worker = self.workers.get(ref)
        if worker is not None:
            worker.close(dispatch_id, now_s)
            self.pool(worker.model, worker.role).move(worker)
            if ref in self._absent and not worker.num_open:
                self._forget(worker)

    def _new_slot(self, worker: Worker) -> None:
        """Drops what the index says of a worker."""
        pool = self.pool(worker.model, worker.role)
        member = pool.by_slot.get(worker.slot) is worker
        if member:
            pool.remove(worker)
        self.index.drop(worker.slot)
        worker.slot = self.index.add()
        if member:
            pool.add(worker)
