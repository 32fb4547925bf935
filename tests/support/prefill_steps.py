"""Which prompts each step of a prefill worker's engine computed, and how far it had come when a Run was cancelled."""

from __future__ import annotations

import asyncio
from typing import Any

from prefill_worker.scheduler import StepPlan
from prefill_worker.server import PrefillWorker


class PrefillSteps:
    """Watches from when it is made. Prompts go by the request ids of their clients."""

    def __init__(self, worker: PrefillWorker) -> None:
        self.steps: list[set[str]] = []
        self._at_cancel: int | None = None
        scheduler, runs = worker._scheduler, worker._runs
        complete, run = scheduler.complete, runs.run

        def completed(plan: StepPlan, result: Any) -> None:
            complete(plan, result)
            self.steps.append({prompt.request.request_id.partition("#")[0] for prompt, _ in plan.prompts})

        async def watched(message: Any) -> Any:
            try:
                return await run(message)
            except asyncio.CancelledError:
                self._at_cancel = len(self.steps)
                raise

        scheduler.complete = completed  # type: ignore[method-assign]
        runs.run = watched  # type: ignore[method-assign]

    def of(self, request_id: str) -> int:
        """Steps that computed a chunk of this prompt."""
        return sum(request_id in step for step in self.steps)

    @property
    def cancelled(self) -> bool:
        return self._at_cancel is not None

    @property
    def after_cancel(self) -> list[set[str]]:
        """Steps that ended after the last cancellation of a Run had arrived at the worker; the first of them may have been under
        way."""
        assert self._at_cancel is not None, "no Run was cancelled"
        return self.steps[self._at_cancel :]
