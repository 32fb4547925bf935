"""Which prompts each step of a prefill worker's engine computed, and how far it had come when a Run was cancelled. The engine can
be held at the end of a step: what is to happen during a prompt does, however fast the prompt or slow the machine."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from prefill_worker.scheduler import StepPlan
from prefill_worker.server import PrefillWorker

PATIENCE_S = 60.0  # an engine that nobody lets go on goes on by itself then, so that a failed test ends


class PrefillSteps:
    """Watches from when it is made. Prompts go by the request ids of their clients."""

    def __init__(self, worker: PrefillWorker) -> None:
        self.steps: list[set[str]] = []
        self.held = False
        self._at_cancel: int | None = None
        self._hold: tuple[str, int] | None = None
        self._gate = threading.Condition()
        scheduler, self._runs = worker._scheduler, worker._runs
        complete, run = scheduler.complete, self._runs.run

        def completed(plan: StepPlan, result: Any) -> None:
            complete(plan, result)
            self.steps.append({prompt.request.request_id.partition("#")[0] for prompt, _ in plan.prompts})
            with self._gate:
                self.held = self._is_to_be_held()
                if not self._gate.wait_for(lambda: not self._is_to_be_held(), PATIENCE_S):
                    self._hold = None
                self.held = False

        async def watched(message: Any) -> Any:
            try:
                return await run(message)
            except asyncio.CancelledError:
                self._at_cancel = len(self.steps)
                raise

        scheduler.complete = completed  # type: ignore[method-assign]
        self._runs.run = watched  # type: ignore[method-assign]

    def hold(self, request_id: str, after_steps: int) -> None:
        """The engine stops when it has computed that many chunks of this prompt; where it is held, it goes on until then."""
        with self._gate:
            self._hold = (request_id, after_steps)
            self._gate.notify()

    def go_on(self) -> None:
        with self._gate:
            self._hold = None
            self._gate.notify()

    def _is_to_be_held(self) -> bool:
        return self._hold is not None and self.of(self._hold[0]) >= self._hold[1]

    def posted(self, request_id: str) -> bool:
        """Whether the engine will know of this prompt when it looks next."""
        return any(key.partition("#")[0] == request_id for key in self._runs._news)

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
