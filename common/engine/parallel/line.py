"""Steps behind each other in a pipeline that does not run empty between them.

    stage 0   | n.a | n.b | n+1.a | n+1.b | ...         a part enters when stage 0 is free and the tokens are drawn that it
    stage 1         | n.a | n.b | n+1.a | n+1.b ...     begins with: n+1.a needs n.a, and never n.b as well
                             draws n.a, then n.b ...

Two threads do this, beside the one that launches. One has parts enter: it tells the ranks of each and computes this rank's share.
The other takes what leaves the last stage, draws, and so lets in who waits for these tokens. Each does its work in the order in
which parts were launched, and every rank computes them in that order: so a stage has computed a sequence's step n before n+1.
With as many parts as stages no stage waits between two steps, but for the time that drawing takes.

That the second thread takes logits while the first sends rows is also why no two ranks can wait for each other to read. What is
done to blocks between steps waits until nothing is under way (`ModelRunner.settle`). A part whose tokens cannot be drawn takes
those along that need them, and then all steps behind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from common.engine.batch import ForwardResult, ScheduledBatch
from common.engine.drawing import Drawing
from common.engine.in_flight_step import FutureStep, drawn_at, has_placeholder, has_placeholders, with_tokens
from common.engine.models import LayerDone
from common.engine.parallel.micro_batches import Part, divide, join, num_micro_batches
from common.engine.to_device import on_the_stream_of_here
from common.types import SampledToken

BeginDrawing = Callable[[ScheduledBatch], Drawing]


class Stages(Protocol):
    """Of `Conductor`, what is used here."""

    def enter(
        self,
        part: ScheduledBatch,
        wanted: Sequence[Sequence[int]],
        kept: Sequence[int],
        *,
        ends_step: bool,
        layer_done: LayerDone | None,
    ) -> None: ...

    def leave(
        self, wanted: Sequence[Sequence[int]], kept: Sequence[int], *, ends_step: bool, layer_done: LayerDone | None
    ) -> Iterator[torch.Tensor]: ...


class LineStep(FutureStep):
    """A step in parts."""

    def __init__(self, parts: Sequence[Part], num_slices: int, layer_done: LayerDone | None) -> None:
        super().__init__(layer_done)
        self.parts = parts
        self.num_slices = num_slices
        self.drawn: list[Future[ForwardResult]] = []  # of each part
        # The last piece of a slice is the one that is drawn from.
        self._places = {index: (number, place) for number, part in enumerate(parts) for place, index in enumerate(part.indexes)}

    def home(self, index: int) -> int:
        """The part that a slice's token is drawn in."""
        return self._places[index][0]

    def drawn_by(self, index: int) -> Sequence[SampledToken]:
        """Waits for them."""
        number, place = self._places[index]
        return self.drawn[number].result().slices[place].tokens


class Line:
    """One per group. Its user is the thread that launches."""

    def __init__(self, stages: Stages, num_stages: int, least_tokens: int, device: torch.device) -> None:
        self._stages = stages
        self._num_stages = num_stages
        self._least_tokens = least_tokens
        self._device = device
        self._latest: LineStep | None = None
        self._threads: tuple[ThreadPoolExecutor, ThreadPoolExecutor] | None = None

    def launch(self, batch: ScheduledBatch, drawing: BeginDrawing, layer_done: LayerDone | None) -> LineStep:
        """`drawing` begins what is drawn of a part, before that enters. As `ModelRunner.launch`."""
        entering, leaving = self._threads = self._threads or self._start_threads()
        behind = self._latest
        homes = [None if behind is None or not has_placeholder(item) else behind.home(drawn_at(item)) for item in batch.slices]
        goes_on = has_placeholders(batch)
        count = num_micro_batches(batch.num_tokens, self._num_stages, self._least_tokens, goes_on=goes_on)
        step = LineStep(divide(batch, count, homes), len(batch.slices), layer_done)
        entered = None if behind is None else behind.makes_room
        for part in step.parts:
            ends_step = part is step.parts[-1]
            tell = step.tell if ends_step else None
            entered = entering.submit(self._enter, part.batch, drawing, behind, entered, ends_step, tell)
            step.drawn.append(leaving.submit(self._leave, entered, ends_step, tell))
        before = None if behind is None else behind.future
        step.promise(leaving.submit(_result, step.parts, tuple(step.drawn), step.num_slices, before), entered)
        self._latest = step
        return step

    def _start_threads(self) -> tuple[ThreadPoolExecutor, ThreadPoolExecutor]:
        initializer = on_the_stream_of_here(self._device)
        entering, leaving = (
            ThreadPoolExecutor(1, thread_name_prefix=name, initializer=initializer) for name in ("parts enter", "parts leave")
        )
        return entering, leaving

    def _enter(
        self,
        part: ScheduledBatch,
        begin: BeginDrawing,
        behind: LineStep | None,
        entered_before: Future[Drawing] | None,
        ends_step: bool,
        tell: LayerDone | None,
    ) -> Drawing:
        if entered_before is not None:
            entered_before.result()  # it is over; if it could not enter, nothing behind it does
        if behind is not None:
            part = with_tokens(part, behind.drawn_by)
        drawing = begin(part)
        self._stages.enter(part, drawing.wanted, drawing.kept, ends_step=ends_step, layer_done=tell)
        return drawing

    def _leave(self, entered: Future[Drawing], ends_step: bool, tell: LayerDone | None) -> ForwardResult:
        drawing = entered.result()
        logits = self._stages.leave(drawing.wanted, drawing.kept, ends_step=ends_step, layer_done=tell)
        try:
            return drawing.draw(logits)
        finally:
            deque(logits, maxlen=0)  # what nobody looked at is on its way all the same


def _result(
    parts: Sequence[Part],
    drawn: Sequence[Future[ForwardResult]],
    num_slices: int,
    behind: Future[ForwardResult] | None,
) -> ForwardResult:
    """All of these are over: one thread takes them in their order."""
    if behind is not None:
        behind.result()
    return join(parts, [future.result() for future in drawn], num_slices)
