"""One step of an engine: schedule, copy, compute, account. The same for both pools; what differs is the scheduler.

    commands -> scheduler -> StepPlan -> pool copies, runner -> ForwardResult -> scheduler -> events
                                                         `-> a group of layers is computed -> LayerWatcher -> events

With a scheduler that can plan ahead, steps overlap. While one is computed the next is planned and launched behind it; then the
first is read, accounted for and told of, while the second is computed already:

    computing    |--- step 1 ---|--- step 2 ---|--- step 3 ---|
    this thread  plan 2 .......read 1, plan 3 .read 2, plan 4         and commands, in between

Where the scheduler has to know the tokens first (`Wait`), the next step is planned when they are there, as without overlap.

Runs on the engine's thread (`common.engine.loop`). Commands reach the scheduler between steps (`EngineLoop.post`), also while a
step is under way. It knows neither requests nor gRPC nor KV transfer.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from common.clock import Clock
from common.engine.batch import ForwardResult, ScheduledBatch
from common.engine.engine import Engine
from common.engine.in_flight_step import InFlightStep
from common.engine.stopping import StepStopped
from common.errors import IllegalTransition
from common.metrics import WorkerMetrics


@dataclass(slots=True)
class SchedulerTotals:
    """What a scheduler counts since its start, for metrics; only ever grows."""

    submitted: int = 0  # requests
    preemptions: int = 0
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits: int = 0  # of them found
    computed_tokens: int = 0  # tokens written to KV here
    generated_tokens: int = 0  # tokens drawn here
    drafted_tokens: int = 0  # rows that were spent on guesses
    accepted_tokens: int = 0  # guesses that were right, and were used
    prefill_s: float = 0.0  # of the steps' time, shared by rows: for prompt tokens, and tokens computed again
    decode_s: float = 0.0  # for tokens that came
    wasted_s: float = 0.0  # for guesses that were wrong
    guesses_by_author: dict[str, tuple[int, int]] = field(default_factory=dict)  # drafted and accepted tokens, by who guessed
    surplus_rows: int = 0  # rows of steps planned ahead, for answers that had ended
    steps_ahead: int = 0  # that were planned while another was computed
    waits: dict[str, int] = field(default_factory=dict)  # steps that were not, by the reason
    swapped_out: int = 0  # preemptions that kept the KV
    swapped_in: int = 0
    steps_by_accepted: list[int] = field(default_factory=list)  # steps of a sequence that had drafts, by how many were right

    def step_done(self, seconds: float, *, rows: int, prefill_rows: int, wasted_rows: int) -> None:
        row_s = seconds / max(1, rows)
        self.prefill_s += prefill_rows * row_s
        self.wasted_s += wasted_rows * row_s
        self.decode_s += (rows - prefill_rows - wasted_rows) * row_s

    def drafted(self, num_drafts: int, num_accepted: int, author: str) -> None:
        """`author` is the name of who guessed."""
        drafted, accepted = self.guesses_by_author.get(author, (0, 0))
        self.guesses_by_author[author] = drafted + num_drafts, accepted + num_accepted
        self.drafted_tokens += num_drafts
        self.accepted_tokens += num_accepted
        while len(self.steps_by_accepted) <= num_accepted:
            self.steps_by_accepted.append(0)
        self.steps_by_accepted[num_accepted] += 1


class Plan(Protocol):
    """What a scheduler wants done in one step."""

    @property
    def batch(self) -> ScheduledBatch: ...

    @property
    def copies(self) -> Sequence[tuple[int, int]]:
        """(source, destination) blocks to be copied before the batch is computed."""
        ...


PlanType = TypeVar("PlanType", bound=Plan)
PlanOut = TypeVar("PlanOut", bound=Plan, covariant=True)
WatchedPlan = TypeVar("WatchedPlan", contravariant=True)
Event = TypeVar("Event")


class Scheduler(Protocol[PlanType, Event]):
    """`schedule` and `complete` alternate; a plan with an empty batch is not completed, nor one that was stopped."""

    @property
    def is_idle(self) -> bool:
        """Whether it holds no block."""
        ...

    def schedule(self) -> PlanType: ...

    def complete(self, plan: PlanType, result: ForwardResult) -> None: ...

    def take_events(self) -> list[Event]: ...


class PlanningAhead(Protocol[PlanOut]):
    """A scheduler that can plan a step while another is computed."""

    def schedule_ahead(self) -> PlanOut | enum.Enum:
        """The step behind the one under way, which was planned last and is not completed; its batch is not empty. Or why it
        cannot be planned yet."""
        ...


class LayerWatcher(Protocol[WatchedPlan]):
    """Wants to know how far a step has come, in groups of layers."""

    def layers_computed(self, plan: WatchedPlan, first_layer: int, end_layer: int) -> None:
        """Keys and values of the layers [first, end) of the plan's batch are in the pool. In order; the last group ends with
        the model's last layer."""
        ...

    def wants(self, plan: WatchedPlan) -> bool:
        """Whether anybody wants what is left of the plan's step. Asked between layers where a step can be stopped."""
        ...

    def stopped(self, plan: WatchedPlan) -> None:
        """Its step was stopped as nobody wanted it: the plan is not completed."""
        ...


class Core(Generic[PlanType, Event]):
    """An `EngineCore` for the engine's thread."""

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler[PlanType, Event],
        metrics: WorkerMetrics,
        clock: Clock,
        *,
        watcher: LayerWatcher[PlanType] | None = None,
        layer_groups: int = 1,
        on_step: Callable[[int, float, float], None] | None = None,
        before_step: Callable[[PlanType], None] | None = None,
        ahead: PlanningAhead[PlanType] | None = None,
    ) -> None:
        """`on_step` is told the tokens, the pairs (`common.load.pairs`) and the seconds of every step. `before_step` does to
        memory what a plan wants beyond copies, before these and the batch are begun. `ahead` is the scheduler, if steps are to
        overlap."""
        self._before_step = before_step
        self._ahead = ahead
        self._watcher = watcher
        self._on_step = on_step
        self._group_ends = group_ends(engine.layout.num_layers, layer_groups)
        self._engine = engine
        self._scheduler = scheduler
        self._metrics = metrics
        self._clock = clock
        self._plan: PlanType | None = None
        self._step: InFlightStep | None = None  # of that plan, if it was launched
        self._started_s = 0.0  # of that plan's step, or when the one before it ended

    def schedule(self) -> bool:
        if self._step is not None:
            return True  # planned ahead
        self._started_s = self._clock.monotonic_s()
        plan = self._scheduler.schedule()
        self._prepare(plan)
        if not plan.batch.slices:
            if self._scheduler.is_idle:
                self._engine.blocks.check_integrity()
            return False
        self._plan = plan
        return True

    def compute(self, hand_over: Callable[[], None]) -> None:
        plan = self._plan
        if plan is None:
            raise IllegalTransition("compute without a schedule")
        watch = None if self._watcher is None else self._watch(self._watcher, plan, hand_over)
        step, following = self._step, None if self._ahead is None else self._ahead.schedule_ahead()
        self._plan = self._step = None
        if following is None or isinstance(following, enum.Enum):
            try:
                result = self._engine.runner.execute(plan.batch, watch) if step is None else step.collect()
            except StepStopped:
                if self._watcher is not None:
                    self._watcher.stopped(plan)
                return
        else:
            if step is None:
                step = self._engine.runner.launch(plan.batch, watch)
            self._prepare(following)
            self._plan, self._step = following, self._engine.runner.launch(following.batch)
            hand_over()  # what letting new ones in had to say
            result = step.collect()
        self._complete(plan, result)

    def finish(self) -> None:
        plan, step = self._plan, self._step
        self._plan = self._step = None
        if plan is not None and step is not None:
            self._complete(plan, step.collect())

    def abandon(self) -> None:
        self._engine.runner.settle()

    def _prepare(self, plan: PlanType) -> None:
        if self._before_step is not None:
            self._before_step(plan)
        for source, destination in plan.copies:
            self._engine.runner.copy_block(source, destination)

    def _complete(self, plan: PlanType, result: ForwardResult) -> None:
        self._scheduler.complete(plan, result)
        self._metrics.step_tokens.observe(plan.batch.num_tokens)
        now_s = self._clock.monotonic_s()
        seconds, self._started_s = now_s - self._started_s, now_s
        self._metrics.step_s.observe(seconds)
        if self._on_step is not None:
            self._on_step(plan.batch.num_tokens, plan.batch.num_pairs, seconds)

    def take_events(self) -> list[Event]:
        return self._scheduler.take_events()

    def _watch(self, watcher: LayerWatcher[PlanType], plan: PlanType, hand_over: Callable[[], None]) -> Callable[[int], None]:
        first_layer = 0
        all_layers, can_stop = self._engine.layout.num_layers, self._engine.runner.can_stop

        def layer_done(num_layers: int) -> None:
            nonlocal first_layer
            if num_layers in self._group_ends:
                watcher.layers_computed(plan, first_layer, num_layers)
                first_layer = num_layers
                hand_over()
            if can_stop and num_layers < all_layers and not watcher.wants(plan):
                raise StepStopped

        return layer_done


def group_ends(num_layers: int, num_groups: int) -> frozenset[int]:
    """Where groups of layers end: as many as asked for, at most one per layer, equal but for one layer."""
    groups = max(1, min(num_groups, num_layers))
    return frozenset(num_layers * group // groups for group in range(1, groups + 1))
