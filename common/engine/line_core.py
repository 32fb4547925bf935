"""A core for a pipeline whose scheduler can plan a step while another is under way, and waits for no token: that of prompts.

    stage 0      |--- n ---|-- n+1 --|-- n+2 --|
    later stages           |--- n ---|-- n+1 --|
    this thread  plan n    plan n+1  read n, plan n+2          and commands, in between

A step is planned when the first stage is free, and not before: so who comes meanwhile, and goes first, waits no longer than the
first stage takes; and of what nobody wants any more no more is computed than what has entered. Two steps are under way at most.
Where nothing was left to plan, who comes then waits for the step under way.
"""

from __future__ import annotations

from collections.abc import Callable

from common.engine.core import Core, Event, PlanType
from common.engine.in_flight_step import InFlightStep
from common.errors import IllegalTransition


class LineCore(Core[PlanType, Event]):
    """As `Core`; the scheduler's `schedule` is called while a step is under way, and its plans are completed in order."""

    _under_way: tuple[PlanType, InFlightStep] | None = None

    def schedule(self) -> bool:
        plan = self._scheduler.schedule()
        if self._under_way is None:
            self._started_s = self._clock.monotonic_s()
            if not plan.batch.slices and self._scheduler.is_idle:
                self._engine.blocks.check_integrity()
        self._plan = plan if plan.batch.slices else None
        return self._plan is not None or self._under_way is not None

    def compute(self, hand_over: Callable[[], None]) -> None:
        plan, before = self._plan, self._under_way
        if plan is None and before is None:
            raise IllegalTransition("compute without a schedule")
        self._plan = self._under_way = None
        if plan is not None:
            self._prepare(plan)
            watch = None if self._watcher is None else self._watch(self._watcher, plan, hand_over)
            self._under_way = plan, self._engine.runner.launch(plan.batch, watch)
        if before is not None:
            self._complete(before[0], before[1].collect())
            hand_over()
        if self._under_way is not None:
            self._under_way[1].wait_for_room()

    def finish(self) -> None:
        before, self._under_way = self._under_way, None
        if before is not None:
            self._complete(before[0], before[1].collect())
