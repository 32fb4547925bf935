"""Seconds and calls of named stages. A stage's seconds are its own: what it calls that is a stage as well counts there alone.

Objects are watched from outside: `around` gives something that does what the object does and times some of its methods. So code
that nobody watches has nothing in it that could be off. One thread uses a stopwatch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

Target = TypeVar("Target")


class Stopwatch:
    def __init__(self, now_s: Callable[[], float] = time.perf_counter) -> None:
        self.now_s = now_s
        self._within: list[float] = []  # per stage that is running, seconds of the stages that it called
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def reset(self) -> None:
        self.seconds.clear()
        self.calls.clear()

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose time is the stage's."""

        def call(*arguments: Any, **named: Any) -> Any:
            started_s = self.now_s()
            self._within.append(0.0)
            try:
                return function(*arguments, **named)
            finally:
                whole_s = self.now_s() - started_s
                own_s = whole_s - self._within.pop()
                if self._within:
                    self._within[-1] += whole_s
                self.seconds[stage] = self.seconds.get(stage, 0.0) + own_s
                self.calls[stage] = self.calls.get(stage, 0) + 1

        return call

    def around(self, target: Target, **stages: str) -> Target:
        """Stands in for the target; `stages` names methods and the stage that the time of each is."""
        methods = {name: self.timed(stage, getattr(target, name)) for name, stage in stages.items()}
        return cast(Target, _StandIn(target, methods))


class _StandIn:
    def __init__(self, target: object, methods: dict[str, Callable[..., Any]]) -> None:
        self._target = target
        self._methods = methods

    def __getattr__(self, name: str) -> Any:
        found = self._methods.get(name)
        return getattr(self._target, name) if found is None else found
