"""Steps that were launched and whose results nobody has read yet.

    runner.launch(batch) -> InFlightStep -> collect() -> ForwardResult
    runner.launch(next)     while the first is still being computed: what follows of a token that nobody knows yet

A token id below zero stands for a token of the step launched before: -1 - i is what that step draws for its slice i, which has
one sample. It is looked up where the step is computed: on the host behind the end of the other step, or on the device
(`captured`).

`collect` may be called more than once, and by one thread; it gives the same result or raises the same error. Steps are computed
in the order of their launches; what fails takes those behind it along. How steps follow each other through the stages of a
pipeline is told in `parallel/line.py`. It knows neither requests nor who reads its result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, Protocol

from common.engine.batch import ForwardResult, ScheduledBatch, SequenceSlice
from common.engine.models import LayerDone
from common.types import SampledToken

_ROOM = 0  # among numbers of layers: there is room for the next step


class InFlightStep(Protocol):
    def collect(self) -> ForwardResult:
        """Waits for the step. What it was launched with to be told of layers is called from within, on this thread."""
        ...

    def wait_for_room(self) -> None:
        """Waits until a step behind it would begin at once: with one stage, until it is over. Tells of layers as `collect`."""
        ...

    def settle(self) -> None:
        """Waits until nothing of it is computed any more, whatever came of it."""
        ...


def placeholder_of(index: int) -> int:
    """Stands for the token that the step before draws for its slice `index`."""
    return -1 - index


def has_placeholder(item: SequenceSlice) -> bool:
    return item.token_ids[0] < 0


def drawn_at(item: SequenceSlice) -> int:
    """The slice of the step before whose token the placeholder stands for."""
    return -1 - item.token_ids[0]


def has_placeholders(batch: ScheduledBatch) -> bool:
    return any(has_placeholder(item) for item in batch.slices)


def with_tokens_of(batch: ScheduledBatch, before: ForwardResult) -> ScheduledBatch:
    """The batch with the tokens that its placeholders stand for."""
    return with_tokens(batch, lambda index: before.slices[index].tokens)


def with_tokens(batch: ScheduledBatch, drawn_by: Callable[[int], Sequence[SampledToken]]) -> ScheduledBatch:
    """The same; `drawn_by` says what a slice of the step before has drawn."""
    slices = [
        replace(item, token_ids=[_known(drawn_by(drawn_at(item)))]) if has_placeholder(item) else item for item in batch.slices
    ]
    return replace(batch, slices=tuple(slices))


def _known(drawn: Sequence[SampledToken]) -> int:
    # Where nothing could be drawn the answer has ended, and what is computed for it is thrown away.
    return drawn[0].token_id if drawn else 0


class FutureStep:
    """A step that other threads compute. What they tell of layers waits for whoever collects it."""

    def __init__(self, layer_done: LayerDone | None) -> None:
        """Whoever makes one promises a result before anybody else has it."""
        self.future: Future[ForwardResult]
        self.makes_room: Future[Any]  # likewise
        self._layer_done = layer_done
        self._layers: SimpleQueue[int | None] = SimpleQueue()

    @property
    def tell(self) -> LayerDone | None:
        """To be called by who computes, for each layer; None if nobody wants to know."""
        return None if self._layer_done is None else self._layers.put

    def promise(self, future: Future[ForwardResult], makes_room: Future[Any] | None = None) -> None:
        """`makes_room` is over as soon as the next step would begin at once; None: when this one is over."""
        self.future = future
        self.makes_room = future if makes_room is None else makes_room
        if self._layer_done is not None:
            if makes_room is not None:
                makes_room.add_done_callback(lambda _: self._layers.put(_ROOM))
            future.add_done_callback(lambda _: self._layers.put(None))

    @property
    def is_over(self) -> bool:
        return self.future.done()

    def collect(self) -> ForwardResult:
        layer_done, self._layer_done = self._layer_done, None
        if layer_done is not None:
            while (num_layers := self._layers.get()) is not None:
                if num_layers != _ROOM:
                    layer_done(num_layers)
        return self.future.result()

    def wait_for_room(self) -> None:
        if self._layer_done is None:
            wait([self.makes_room])
            return
        while (num_layers := self._layers.get()) not in (_ROOM, None):
            self._layer_done(num_layers)
        if num_layers is None:
            self._layers.put(None)  # for `collect`

    def settle(self) -> None:
        wait([self.future])


class ThreadStep(FutureStep):
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
        super().__init__(layer_done)
        if isinstance(behind, ThreadStep):
            self.promise(thread.submit(_compute_behind, behind.future, compute, batch, self.tell))
        else:  # what a device has drawn is read by the thread that launched it
            known = batch if behind is None else with_tokens_of(batch, behind.collect())
            self.promise(thread.submit(compute, known, self.tell))


def _compute_behind(
    before: Future[ForwardResult],
    compute: Callable[[ScheduledBatch, LayerDone | None], ForwardResult],
    batch: ScheduledBatch,
    layer_done: LayerDone | None,
) -> ForwardResult:
    return compute(with_tokens_of(batch, before.result()), layer_done)  # it is over: one thread computes all
