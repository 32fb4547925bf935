"""Steps that were launched and whose results nobody has read yet.

    runner.launch(batch) -> InFlightStep -> collect() -> ForwardResult
    runner.launch(next)     while the first is still being computed: what follows of a token that nobody knows yet

A token id below zero stands for a token of the step launched before: -1 - i is what that step draws for its slice i, which has
one sample. It is looked up where the step is computed: on the host behind the end of the other step, or on the device
(`captured`).

`collect` may be called more than once, and by one thread; it gives the same result or raises the same error. Steps are computed
in the order of their launches; what fails takes those behind it along. It knows neither requests nor who reads its result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import replace
from queue import SimpleQueue
from typing import Protocol

from common.engine.batch import ForwardResult, ScheduledBatch
from common.engine.models import LayerDone


class InFlightStep(Protocol):
    def collect(self) -> ForwardResult:
        """Waits for the step. What it was launched with to be told of layers is called from within, on this thread."""
        ...

    def settle(self) -> None:
        """Waits until nothing of it is computed any more, whatever came of it."""
        ...


def placeholder_of(index: int) -> int:
    """Stands for the token that the step before draws for its slice `index`."""
    return -1 - index


def has_placeholders(batch: ScheduledBatch) -> bool:
    return any(item.token_ids[0] < 0 for item in batch.slices)


def with_tokens_of(batch: ScheduledBatch, before: ForwardResult) -> ScheduledBatch:
    """The batch with the tokens that its placeholders stand for."""
    slices = [replace(item, token_ids=_known(item.token_ids, before)) if item.token_ids[0] < 0 else item for item in batch.slices]
    return replace(batch, slices=tuple(slices))


def _known(token_ids: Sequence[int], before: ForwardResult) -> list[int]:
    drawn = before.slices[-1 - token_ids[0]].tokens
    # Where nothing could be drawn the answer has ended, and what is computed for it is thrown away.
    return [drawn[0].token_id if drawn else 0]


class ThreadStep:
    """Computed by a thread of its own, behind the step before. Made by the thread that launches."""

    def __init__(
        self,
        thread: Executor,
        compute: Callable[[ScheduledBatch, LayerDone | None], ForwardResult],
        batch: ScheduledBatch,
        *,
        behind: InFlightStep | None,
        layer_done: LayerDone | None = None,
    ) -> None:
        self._layers: SimpleQueue[int | None] = SimpleQueue()
        self._layer_done = layer_done
        tell = None if layer_done is None else self._layers.put
        self._future: Future[ForwardResult]
        if isinstance(behind, ThreadStep):
            self._future = thread.submit(_compute_behind, behind._future, compute, batch, tell)
        else:  # what a device has drawn is read by the thread that launched it
            known = batch if behind is None else with_tokens_of(batch, behind.collect())
            self._future = thread.submit(compute, known, tell)
        if layer_done is not None:
            self._future.add_done_callback(lambda _: self._layers.put(None))

    @property
    def is_over(self) -> bool:
        return self._future.done()

    def collect(self) -> ForwardResult:
        layer_done, self._layer_done = self._layer_done, None
        if layer_done is not None:
            while (num_layers := self._layers.get()) is not None:
                layer_done(num_layers)
        return self._future.result()

    def settle(self) -> None:
        wait([self._future])


def _compute_behind(
    before: Future[ForwardResult],
    compute: Callable[[ScheduledBatch, LayerDone | None], ForwardResult],
    batch: ScheduledBatch,
    layer_done: LayerDone | None,
) -> ForwardResult:
    return compute(with_tokens_of(batch, before.result()), layer_done)  # it is over: one thread computes all
