"""Swap space as a worker has it: the account that the scheduler keeps, and the memory that plans are carried out in.

Made once, beside the engine; lives as long as its scheduler. On the engine's thread.
"""

from __future__ import annotations

from typing import Protocol

from common.engine.engine import Engine
from common.engine.swap_region import SwapSpace
from decode_worker.preemption_cost import PreemptionCost
from decode_worker.step_plan import StepPlan
from decode_worker.swapping import Swapping


class SwapConfig(Protocol):
    """Of `common.config.DecodeConfig`, what is said of preemption."""

    @property
    def preemption(self) -> str: ...

    @property
    def swap_bytes(self) -> int: ...


class Swapper:
    def __init__(self, region: SwapSpace, *, always: bool) -> None:
        self._region = region
        self.swapping = Swapping(
            region.num_slots, PreemptionCost(region.block_bytes, region.measured_bytes_per_s()), always=always
        )

    def move(self, plan: StepPlan) -> None:
        """Before the plan's step is begun."""
        if plan.swapped_in or plan.swapped_out:
            moved_bytes, moving_s = self._region.moved_bytes, self._region.moving_s
            self._region.move(plan.swapped_in, plan.swapped_out)
            self.swapping.cost.observe_copies(self._region.moved_bytes - moved_bytes, self._region.moving_s - moving_s)

    def close(self) -> None:
        """When no step is computed any more."""
        self._region.close()


def create_swapper(config: SwapConfig, engine: Engine) -> Swapper | None:
    """None if what is preempted is always computed again."""
    if config.preemption == "recompute" or config.swap_bytes < engine.layout.block_bytes:
        return None
    return Swapper(engine.swap_space(config.swap_bytes), always=config.preemption == "swap")
