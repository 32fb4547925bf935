"""What the queue asks about the workers, and the answer of a router that knows only its own dispatches.

    room      how much the ready workers of a model may be given at once, all together
    ttft_s    how long the first token takes once a request is dispatched

`PoolRoom` takes the room from the configuration and the membership. `ServiceRate` learns how fast requests start while several
wait to, how long one takes to start alone, and how far its own predictions are off. Time is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from common.config import AdmissionConfig, ModelConfig
from common.types import Request

_HALF_LIFE_S = 20.0  # of what was seen of the workers' rate, in time during which several waited
_SAMPLES = 64.0  # of first tokens, after which an old one counts for 1/e
_ENOUGH_STARTS = 4.0
_QUANTILE = 0.9  # of first tokens are to come within the prediction
_ERROR_STEP = 0.05
_MOST_ERROR = 4.0


@dataclass(frozen=True, slots=True)
class Room:
    """Of all ready decode workers of a model."""

    tokens: float
    sequences: float


class Forecast(Protocol):
    def room(self, model: str) -> Room | None:
        """None: not known, or there is nobody; then nothing waits here."""
        ...

    def ttft_s(self, request: Request) -> float | None:
        """Of a request that is dispatched now, with what the workers have to do before it. None: not known."""
        ...


class PoolRoom:
    """A `Forecast` whose room is a matter of configuration. `count` says how many decode workers of a model are ready, `predict`
    what placement thinks of a request, if it has learnt to."""

    def __init__(
        self,
        config: AdmissionConfig,
        models: Mapping[str, ModelConfig],
        count: Callable[[str], int],
        predict: Callable[[Request], float | None] = lambda request: None,
    ) -> None:
        self._predict = predict
        self._config = config
        self._models = models
        self._count = count

    def room(self, model: str) -> Room | None:
        part, workers = self._models.get(model), self._count(model)
        if part is None or not workers:
            return None
        return Room(
            tokens=workers * self._config.room_pools * part.engine.kv_pool_tokens,
            sequences=workers * self._config.room_batches * part.decode.max_running,
        )

    def ttft_s(self, request: Request) -> float | None:
        return self._predict(request)


class ServiceRate:
    """Of one model. What waits to start is what is queued and what was dispatched and has no first token yet. Whatever holds it
    up, a place in a batch, a prefill worker or memory: the rate of first tokens says how fast it goes."""

    def __init__(self) -> None:
        self._busy_since_s: float | None = None
        self._busy_s = self._started_tokens = self._starts = 0.0
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._error = 1.0  # nine in ten first tokens come within so many times the prediction

    # -- while others wait ---------------------------------------------------------------------------------------------

    def waiting(self, several: bool, now_s: float) -> None:
        """Whether more than one waits to start, from now on: only then the rate is the workers', and not the clients'."""
        self._pass(now_s)
        self._busy_since_s = now_s if several else None

    def started(self, tokens: float, now_s: float) -> None:
        if self._busy_since_s is not None:
            self._pass(now_s)
            self._started_tokens += tokens
            self._starts += 1

    @property
    def tokens_per_s(self) -> float | None:
        if self._starts < _ENOUGH_STARTS or self._busy_s <= 0:
            return None
        return self._started_tokens / self._busy_s

    def _pass(self, now_s: float) -> None:
        if self._busy_since_s is None:
            return
        passed_s = max(0.0, now_s - self._busy_since_s)
        kept = 0.5 ** (passed_s / _HALF_LIFE_S)
        self._busy_s = self._busy_s * kept + passed_s
        self._started_tokens *= kept
        self._starts *= kept
        self._busy_since_s = now_s

    # -- alone ---------------------------------------------------------------------------------------------------------

    def started_alone(self, prompt_tokens: int, seconds: float) -> None:
        """One before which nobody waited."""
        kept = math.exp(-1 / _SAMPLES)
        self._weight = self._weight * kept + 1
        self._x = self._x * kept + prompt_tokens
        self._y = self._y * kept + seconds
        self._xx = self._xx * kept + prompt_tokens * prompt_tokens
        self._xy = self._xy * kept + prompt_tokens * seconds

    def alone_s(self, prompt_tokens: int) -> float:
        """As long as nothing is known, no time at all."""
        if not self._weight:
            return 0.0
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x * mean_x
        slope = (self._xy / self._weight - mean_x * mean_y) / spread if spread > 1e-9 * (1 + mean_x * mean_x) else 0.0
        return max(0.0, mean_y + max(0.0, slope) * (prompt_tokens - mean_x))

    # -- how good the predictions are ----------------------------------------------------------------------------------

    @property
    def error(self) -> float:
        return self._error

    def happened(self, predicted_s: float, seconds: float) -> None:
        """To a request of which this was predicted, before the correction by `error`."""
        late = seconds > predicted_s * self._error
        self._error *= math.exp(_ERROR_STEP * (_QUANTILE if late else _QUANTILE - 1))
        self._error = min(max(self._error, 1 / _MOST_ERROR), _MOST_ERROR)
