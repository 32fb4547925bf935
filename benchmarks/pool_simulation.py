"""Two pools of workers in virtual time, as coarse as an autoscaler sees them: what a control law makes of a load.

    arrivals -> prefill workers (first come, first served, so many tokens per second)
             -> decode workers (a token per sequence takes base + slope * sequences; so many sequences and KV tokens at most)

Every request goes to the least loaded worker of a pool. A worker that is to flip takes nothing new, finishes what it has, and
serves in its other role after `flip_s`; a new one serves after `start_s`. Readings are those of real workers, so the law under
test sees what it would see. It models no hand-off, prefix cache or local prefill.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from common.config import AutoscalingConfig
from common.types import Role
from deploy.autoscaler.law import Act, Candidate, Decision, LawState, ModelView, PoolView, decide
from deploy.autoscaler.need import CapacityFit, decode_need, prefill_need
from deploy.autoscaler.signals import SignalWindow, WorkerReading

TICK_S = 0.05
_BLOCKS = 1000  # that a worker's KV is told in


@dataclass(frozen=True, slots=True)
class Hardware:
    """A worker, in either role."""

    prefill_tokens_per_s: float = 4000.0
    tpot_base_s: float = 0.02
    tpot_slope_s: float = 0.001
    most_sequences: int = 64
    kv_tokens: int = 65_536
    start_s: float = 30.0
    flip_s: float = 0.5


@dataclass(slots=True)
class Job:
    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    first_token_s: float | None = None
    finished_s: float | None = None

    def good(self, ttft_s: float, tpot_s: float) -> bool:
        if self.first_token_s is None or self.finished_s is None:
            return False
        took_s = self.finished_s - self.first_token_s
        return self.first_token_s - self.arrived_s <= ttft_s and took_s <= tpot_s * max(1, self.output_tokens - 1)


@dataclass(slots=True, eq=False)
class _Worker:
    worker_id: str
    role: Role
    ready_s: float
    flip_to: Role | None = None
    leaving: bool = False
    queue: deque[Job] = field(default_factory=deque)  # prefill: to be computed; decode: to be let in
    left_tokens: float = 0.0  # of the first prompt
    running: list[tuple[float, int, Job]] = field(default_factory=list)  # by the progress at which they are done
    progress: float = 0.0  # tokens that every sequence got since the start
    kv_tokens: int = 0
    computed_tokens: float = 0.0
    generated_tokens: float = 0.0
    step_s: float = 0.0
    sequence_step_s: float = 0.0
    served: int = 0

    @property
    def takes(self) -> bool:
        return self.flip_to is None and not self.leaving

    @property
    def queued_tokens(self) -> float:
        waiting = sum(job.prompt_tokens for job in self.queue)
        return waiting - (self.queue[0].prompt_tokens - self.left_tokens if self.queue else 0.0)


class PoolSimulation:
    """`run` lets time pass; `decisions` is what the law did."""

    def __init__(
        self,
        jobs: Iterable[Job],
        *,
        prefill: int,
        decode: int,
        config: AutoscalingConfig | None = None,
        hardware: Hardware | None = None,
    ) -> None:
        """Without a configuration the sizes stay as they are."""
        self.now_s = 0.0
        self.hardware = hardware or Hardware()
        self.config = config
        self.jobs = sorted(jobs, key=lambda job: job.arrived_s)
        self.decisions: list[tuple[float, Decision]] = []
        self.sizes: list[tuple[float, int, int]] = []
        self.worker_s = 0.0
        self._serial = itertools.count()
        self._next = 0
        self._desired = {Role.PREFILL: prefill, Role.DECODE: decode}
        self._workers = [self._new(role, 0.0) for role, count in self._desired.items() for _ in range(count)]
        self._lost_queue: list[Job] = []
        look_back_s = config.look_back_period_s if config is not None else 1.0
        self._window = SignalWindow(look_back_s, 0.0)
        self._fit = CapacityFit()
        self._law = LawState(since_s=0.0)
        self._look_s = 0.0

    def run(self, until_s: float) -> None:
        while self.now_s < until_s:
            self.now_s += TICK_S
            self._arrive()
            for worker in self._workers:
                if worker.ready_s <= self.now_s:
                    self._work(worker)
            self._move_on()
            self.worker_s += TICK_S * len(self._workers)
            if self.config is not None and self.now_s >= self._look_s:
                self._look_s += self.config.interval_s
                self._control(self.config)

    def of(self, role: Role) -> list[_Worker]:
        return [worker for worker in self._workers if worker.role is role]

    # -- workers -------------------------------------------------------------------------------------------------------

    def _new(self, role: Role, ready_s: float) -> _Worker:
        return _Worker(f"m/{role.value}/{next(self._serial)}", role, ready_s)

    def _arrive(self) -> None:
        waiting, self._lost_queue = self._lost_queue, []
        while self._next < len(self.jobs) and self.jobs[self._next].arrived_s <= self.now_s:
            waiting.append(self.jobs[self._next])
            self._next += 1
        for job in waiting:
            takers = [worker for worker in self.of(Role.PREFILL) if worker.takes and worker.ready_s <= self.now_s]
            if not takers:
                self._lost_queue.append(job)
                continue
            to = min(takers, key=lambda worker: worker.queued_tokens)
            if not to.queue:
                to.left_tokens = job.prompt_tokens
            to.queue.append(job)

    def _work(self, worker: _Worker) -> None:
        if worker.role is Role.PREFILL:
            self._prefill(worker)
        else:
            self._decode(worker)

    def _prefill(self, worker: _Worker) -> None:
        budget_s = TICK_S
        while worker.queue and budget_s > 1e-12:
            needed_s = worker.left_tokens / self.hardware.prefill_tokens_per_s
            used_s = min(needed_s, budget_s)
            budget_s -= used_s
            worker.step_s += used_s
            worker.computed_tokens += used_s * self.hardware.prefill_tokens_per_s
            worker.left_tokens -= used_s * self.hardware.prefill_tokens_per_s
            if used_s < needed_s:
                return
            job = worker.queue.popleft()
            job.first_token_s = self.now_s - budget_s
            worker.served += 1
            worker.left_tokens = worker.queue[0].prompt_tokens if worker.queue else 0.0
            takers = [one for one in self.of(Role.DECODE) if one.takes and one.ready_s <= self.now_s] or self.of(Role.DECODE)
            min(takers, key=lambda one: (len(one.running) + len(one.queue), one.kv_tokens)).queue.append(job)

    def _decode(self, worker: _Worker) -> None:
        hardware = self.hardware
        while worker.queue:
            job = worker.queue[0]
            tokens = job.prompt_tokens + job.output_tokens
            if len(worker.running) >= hardware.most_sequences:
                break
            if worker.running and worker.kv_tokens + tokens > hardware.kv_tokens:
                break
            worker.queue.popleft()
            worker.kv_tokens += tokens
            heapq.heappush(worker.running, (worker.progress + job.output_tokens - 1, next(self._serial), job))
        count = len(worker.running)
        if not count:
            return
        tpot_s = hardware.tpot_base_s + hardware.tpot_slope_s * count
        worker.progress += TICK_S / tpot_s
        worker.generated_tokens += count * TICK_S / tpot_s
        worker.step_s += TICK_S
        worker.sequence_step_s += count * TICK_S
        while worker.running and worker.running[0][0] <= worker.progress:
            _, _, job = heapq.heappop(worker.running)
            job.finished_s = self.now_s
            worker.kv_tokens -= job.prompt_tokens + job.output_tokens
            worker.served += 1

    def _move_on(self) -> None:
        for worker in list(self._workers):
            if worker.takes or worker.queue or worker.running:
                continue
            self._workers.remove(worker)
            if worker.flip_to is not None:
                self._workers.append(self._new(worker.flip_to, self.now_s + self.hardware.flip_s))

    # -- control -------------------------------------------------------------------------------------------------------

    def _control(self, config: AutoscalingConfig) -> None:
        ready = [worker for worker in self._workers if worker.ready_s <= self.now_s and worker.takes]
        self._window.add([self._reading(worker) for worker in ready], self.now_s)
        signals = self._window.signals()
        decode = signals.decode
        if decode.tpot_s is not None:
            self._fit = self._fit.seen(decode.batch, decode.tpot_s)
        needs = {
            Role.PREFILL: prefill_need(config, signals.prefill),
            Role.DECODE: decode_need(config, decode, self._fit),
        }

        def view_of(role: Role) -> PoolView:
            pool = self.of(role)
            moving = [one for one in pool if not one.takes or one.ready_s > self.now_s]
            candidates = [Candidate(one.worker_id, len(one.queue) + len(one.running)) for one in pool if one not in moving]
            what = f"{moving[0].worker_id} is on its way" if moving else ""
            return PoolView(self._desired[role], needs[role], what, tuple(candidates))

        view = ModelView(
            prefill=view_of(Role.PREFILL),
            decode=view_of(Role.DECODE),
            requests=signals.requests,
            idle_s=self.now_s - signals.last_use_s,
            demanded=bool(self._lost_queue),
        )
        self._law, decision = decide(config, self._law, view, self.now_s)
        self.sizes.append((self.now_s, self._desired[Role.PREFILL], self._desired[Role.DECODE]))
        if decision.act is not Act.NONE:
            self.decisions.append((self.now_s, decision))
            self._obey(decision)

    def _obey(self, decision: Decision) -> None:
        self._desired = dict(zip((Role.PREFILL, Role.DECODE), decision.sizes, strict=True))
        if decision.act is Act.FLIP:
            (worker,) = [one for one in self._workers if one.worker_id == decision.worker_id]
            worker.flip_to = decision.role
            return
        for role, count in self._desired.items():
            staying = [one for one in self.of(role) if one.takes]
            for _ in range(count - len(staying)):
                self._workers.append(self._new(role, self.now_s + self.hardware.start_s))
            for worker in staying[count:]:
                worker.leaving = True

    def _reading(self, worker: _Worker) -> WorkerReading:
        is_prefill = worker.role is Role.PREFILL
        started = int(is_prefill and bool(worker.queue) and worker.left_tokens < worker.queue[0].prompt_tokens)
        oldest = itertools.islice(worker.queue, started, started + 1)
        since_s = [job.arrived_s if is_prefill else job.first_token_s or self.now_s for job in oldest]
        free = 1.0 - worker.kv_tokens / self.hardware.kv_tokens
        return WorkerReading(
            worker_id=worker.worker_id,
            incarnation=1,
            role=worker.role,
            requests=len(worker.queue) + len(worker.running),
            served=worker.served,
            blocks_total=_BLOCKS,
            blocks_free=int(_BLOCKS * max(0.0, free)),
            queue_age_s=max((self.now_s - one for one in since_s), default=0.0),
            queued_tokens=int(worker.queued_tokens) if is_prefill else 0,
            decoding=len(worker.running),
            computed_tokens=int(worker.computed_tokens),
            generated_tokens=int(worker.generated_tokens),
            step_s=worker.step_s,
            sequence_step_s=worker.sequence_step_s,
        )


@dataclass(frozen=True, slots=True)
class Mix:
    """What requests are like, and how many come."""

    per_s: float
    prompt_tokens: int
    output_tokens: int


def arrivals(mix_at: Callable[[float], Mix], until_s: float, *, seed: int) -> Iterator[Job]:
    """A Poisson process whose rate and lengths follow `mix_at`; lengths vary by a half either way."""
    draw = random.Random(seed)
    at_s = 0.0
    while True:
        mix = mix_at(at_s)
        at_s += draw.expovariate(mix.per_s) if mix.per_s > 0 else 1.0
        if at_s >= until_s:
            return
        if mix.per_s > 0:
            prompt, output = (max(2, round(mean * draw.uniform(0.5, 1.5))) for mean in (mix.prompt_tokens, mix.output_tokens))
            yield Job(at_s, prompt, output)


def goodput(jobs: Sequence[Job], *, ttft_s: float, tpot_s: float) -> float:
    """Share of requests that kept both."""
    return sum(job.good(ttft_s, tpot_s) for job in jobs) / len(jobs) if jobs else 1.0
