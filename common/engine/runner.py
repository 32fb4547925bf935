"""Computes steps: `ScheduledBatch` in, `ForwardResult` out.

    batch -> step input -> model forward (KV goes to the pool) -> logits of the rows that need them -> tokens, log-probabilities
       +----> masks of grammars, in a thread beside the forward -----------------------------------------+

Of which rows logits are wanted, and what is made of them, `drawing` knows. Where several processes compute as one (`StepGroup`),
the forward and the logits are theirs, and drawing stays here. If they are a pipeline, all steps go through its `StepLine`.

A step of single tokens goes another way where there are programs of fixed shape for it (`captured`): the same operations,
launched at once, and greedy tokens drawn on the device.

`execute` computes on the thread that calls it. `launch` returns before the step is computed (`in_flight_step`): a captured step
is the device's work, any other that of a thread which the runner starts for it. A step may be launched behind one that was not
collected, and may begin with tokens that the other one is yet to draw.

One thread uses a runner. It trusts the scheduler about blocks, and it knows neither requests nor who shares what.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, chain
from typing import Protocol

import numpy as np
import torch

from common.engine.attention import create_attention
from common.engine.batch import ForwardResult, ScheduledBatch, SliceResult
from common.engine.captured.buckets import Bucket
from common.engine.captured.steps import DecodeSteps, PendingStep
from common.engine.drawing import Drawing, masks_of, wait_for
from common.engine.grammar import MaskThread
from common.engine.heads.rows import HiddenRow
from common.engine.in_flight_step import FutureStep, InFlightStep, ThreadStep, has_placeholders, with_tokens_of
from common.engine.kv_pool import KVPool
from common.engine.layers_done import told_when_computed
from common.engine.models import LayerDone, Model, TokenPicker
from common.engine.numerics import Numerics
from common.engine.operations import Operations
from common.engine.profile.stopwatch import Stopwatch
from common.engine.step_input import StepBuffers
from common.engine.stopping import StepStopped
from common.engine.to_device import on_the_stream_of_here, to_device
from common.engine.verification import draw, refusal
from common.errors import EngineFailure
from common.metrics import MaskReadings
from common.types import SampledToken


class Successor(Protocol):
    """Knows of a model that is to take over between two steps, over the same pool."""

    def poll(self) -> Model | None:
        """That model, once it is ready; never blocks."""
        ...


class StepLine(Protocol):
    """How steps follow each other through the stages of a pipeline (`common.engine.parallel.line`)."""

    def launch(
        self, batch: ScheduledBatch, drawing: Callable[[ScheduledBatch], Drawing], layer_done: LayerDone | None
    ) -> FutureStep:
        """As `ModelRunner.launch`, behind the step that was launched here before."""
        ...


class StepGroup(Protocol):
    """Several processes that compute as one (`common.engine.parallel.conductor`)."""

    @property
    def line(self) -> StepLine | None:
        """None: there is one stage."""
        ...

    def compute(
        self,
        batch: ScheduledBatch,
        wanted: Sequence[Sequence[int]],
        kept: Sequence[int] = (),
        layer_done: LayerDone | None = None,
    ) -> Iterator[torch.Tensor]:
        """When it returns the step is computed. Then the fp32 logits [rows, vocab] of each group of rows in `wanted`, and behind
        them the hidden rows `kept`, if any: taken one after the other, all of them, before the next step."""
        ...

    def copy_block(self, source: int, destination: int) -> None: ...


class ModelRunner:
    def __init__(
        self,
        model: Model,
        pool: KVPool,
        numerics: Numerics,
        num_heads: int,
        successor: Successor | None = None,
        *,
        steps: DecodeSteps | None = None,
        group: StepGroup | None = None,
    ) -> None:
        """With a group, `model` and `pool` are this process's part of what the group computes."""
        self.steps = steps
        self._successor = successor
        self._group = group
        self._use(model)
        self._line = None if group is None else group.line
        self._pool = pool
        self._attention = create_attention(numerics.operations.attention, pool, num_heads)
        self._operations = numerics.operations
        self._buffers = StepBuffers(pool)
        self._mask_thread = MaskThread()
        self._computing: ThreadPoolExecutor | None = None
        self._latest: FutureStep | _DeviceStep | None = None  # that was launched

    @property
    def mask_readings(self) -> MaskReadings:
        return self._mask_thread.readings

    def without_steps(self) -> ModelRunner:
        """The same runner, which computes every step one operation after the other."""
        other = copy.copy(self)
        other.steps = None
        return other

    def watch(self, stopwatch: Stopwatch) -> Model:
        """Has the parts of every step timed from now on; gives the model that computes them, and no other takes over."""
        model, self._successor = self._model, None
        stages = {"forward": "layers", "logits": "head"} | ({"pick": "head"} if isinstance(model, TokenPicker) else {})
        self._use(stopwatch.around(model, **stages))
        self._buffers = stopwatch.around(self._buffers, fill="prepare")
        self._mask_thread = stopwatch.around(self._mask_thread, begin="masks")
        self._operations = stopwatch.around(self._operations, sample="sampling", report_logprobs="log-probabilities")
        return model

    @property
    def can_stop(self) -> bool:
        """Whether a `layer_done` of `execute` may raise `StepStopped`: nothing but this thread is at work on the step."""
        return self._group is None and self._computing is None and self.steps is None and self._pool.device.type == "cpu"

    def execute(self, batch: ScheduledBatch, layer_done: LayerDone | None = None) -> ForwardResult:
        """Computes one step. Blocks until its tokens are on the host; calls `layer_done` from within, on this thread."""
        if not batch.slices:
            return ForwardResult()
        _check(batch)
        in_line = self._line is not None or self._bucket_of(batch, layer_done) is not None
        if in_line or not self._is_at_rest or has_placeholders(batch):
            return self.launch(batch, layer_done).collect()
        self._latest = None
        return self._execute(batch, layer_done)

    def launch(self, batch: ScheduledBatch, layer_done: LayerDone | None = None) -> InFlightStep:
        """Has one step computed, behind the one that was launched before; that is to be collected before the next launch.
        `layer_done` is called when the step is collected."""
        _check(batch)
        if self._line is not None:
            self._latest = self._line.launch(batch, self._drawing, layer_done)
            return self._latest
        bucket = self._bucket_of(batch, layer_done)
        if self.steps is not None and bucket is not None:
            self._latest = self._launch_on_device(self.steps, batch, bucket)
            return self._latest
        if self._computing is None:
            self._computing = ThreadPoolExecutor(
                1, thread_name_prefix="compute steps", initializer=on_the_stream_of_here(self._pool.device)
            )
        self._latest = ThreadStep(self._computing, self._execute, batch, behind=self._latest, layer_done=layer_done)
        return self._latest

    def settle(self) -> None:
        """Waits until nothing that was launched is computed any more, whatever came of it."""
        if self._latest is not None:
            self._latest.settle()

    @property
    def _is_at_rest(self) -> bool:
        return self._latest is None or self._latest.is_over

    def _bucket_of(self, batch: ScheduledBatch, layer_done: LayerDone | None) -> Bucket | None:
        return None if self.steps is None or layer_done is not None else self.steps.bucket_of(batch)

    def _execute(self, batch: ScheduledBatch, layer_done: LayerDone | None) -> ForwardResult:
        drawing = self._drawing(batch)
        self._let_take_over()
        try:
            if self._picker is not None and drawing.takes_best:
                index = self._index(drawing.sampled, batch)
                hidden = self._forward(batch, layer_done)
                return drawing.pick(self._picker, hidden if index is None else hidden[index])
            logits = self._compute(batch, drawing.wanted, layer_done, drawing.kept)
        except StepStopped:
            drawing.give_up()
            raise
        return drawing.draw(logits)

    def _drawing(self, batch: ScheduledBatch) -> Drawing:
        return Drawing(batch, self._operations, self._mask_thread)

    @torch.inference_mode()
    def _launch_on_device(self, steps: DecodeSteps, batch: ScheduledBatch, bucket: Bucket) -> _DeviceStep:
        before = self._latest
        if before is not None and not (isinstance(before, _DeviceStep) and before.draws_on_device):
            # What was drawn is on the host; and logits that somebody is yet to draw from do not outlive the next launch.
            batch = with_tokens_of(batch, before.collect())
        return _DeviceStep(steps.launch(batch, bucket), batch, self._operations, self._mask_thread)

    @torch.inference_mode()
    def compute_logits(self, batch: ScheduledBatch) -> torch.Tensor:
        """Computes one step and returns the fp32 logits after the last token of each slice: [slices, vocab]."""
        _check(batch)
        ends = accumulate(len(item.token_ids) for item in batch.slices)
        return next(self._compute(batch, [[end - 1 for end in ends]]))

    @torch.inference_mode()
    def compute_all_logits(self, batch: ScheduledBatch) -> torch.Tensor:
        """Computes one step and returns the fp32 logits after every token, slice by slice: [tokens, vocab]."""
        _check(batch)
        return next(self._compute(batch, [range(batch.num_tokens)]))

    @torch.inference_mode()
    def copy_block(self, source: int, destination: int) -> None:
        """Copies a block in the pool before the next step is computed, and behind one that was launched."""
        self.settle()
        if self._group is not None:
            self._group.copy_block(source, destination)
        else:
            self._pool.copy_block(source, destination)

    @torch.inference_mode()
    def _compute(
        self,
        batch: ScheduledBatch,
        wanted: Sequence[Sequence[int]],
        layer_done: LayerDone | None = None,
        kept: Sequence[int] = (),
    ) -> Iterator[torch.Tensor]:
        """As `StepGroup.compute`."""
        if self._group is not None:
            return self._group.compute(batch, wanted, kept, layer_done)
        self._let_take_over()
        indexes = [self._index(rows, batch) for rows in (*wanted, *([kept] if kept else []))]
        hidden, model = self._forward(batch, layer_done), self._model
        chosen = [hidden if index is None else hidden[index] for index in indexes[len(wanted) :]]
        found = (model.logits(hidden if index is None else hidden[index]) for index in indexes[: len(wanted)])
        return chain(found, chosen)

    def _index(self, rows: Sequence[int], batch: ScheduledBatch) -> torch.Tensor | None:
        """Picks these rows out of a step's; None: they are all there are, for none is wanted twice. Made before the layers, so
        that nothing is copied between them and the head."""
        return None if len(rows) == batch.num_tokens else to_device(np.array(rows, dtype=np.int64), self._pool.device)

    def _forward(self, batch: ScheduledBatch, layer_done: LayerDone | None) -> torch.Tensor:
        """The hidden rows of a step that this process computes alone."""
        step = self._buffers.fill(batch)
        for block, filled in step.entered:
            self._pool.clear_tail(block, filled)
        with told_when_computed(layer_done, self._pool.device) as told:
            return self._model.forward(step, self._pool, self._attention, told)

    def _let_take_over(self) -> None:
        if self._successor is not None and (model := self._successor.poll()) is not None:
            self._successor = None
            self._use(model)

    def _use(self, model: Model) -> None:
        self._model = model
        self._picker = model if self._group is None and isinstance(model, TokenPicker) else None


class _DeviceStep:
    """Launched on the device at once. If its tokens were drawn there, reading them waits for one event."""

    def __init__(self, pending: PendingStep, batch: ScheduledBatch, operations: Operations, masks: MaskThread) -> None:
        self.draws_on_device = pending.obstacle is None
        self._pending = pending
        self._slices = batch.slices
        self._operations = operations
        self._masks = masks
        self._rows = pending.rows() if batch.keeps_rows else None
        self._result: ForwardResult | None = None

    @property
    def is_over(self) -> bool:
        return self._result is not None

    def collect(self) -> ForwardResult:
        if self._result is None:
            self._result = ForwardResult(tuple(self._drawn_there() if self.draws_on_device else self._drawn_here()))
        return self._result

    def wait_for_room(self) -> None:
        self._pending.wait()

    def settle(self) -> None:
        self._pending.wait()

    def _drawn_there(self) -> Iterator[SliceResult]:
        for place, (item, token_id) in enumerate(zip(self._slices, self._pending.token_ids(), strict=True)):
            yield SliceResult((SampledToken(token_id, None),), row=self._row(place)) if item.samples else SliceResult()

    @torch.inference_mode()
    def _drawn_here(self) -> list[SliceResult]:
        wait_for(self._masks.begin([mask for item in self._slices for mask in masks_of(item)]))
        rows = [row for row, item in enumerate(self._slices) if item.samples]
        logits = self._pending.logits()
        tokens = draw(logits if len(rows) == len(logits) else logits[rows], self._slices, self._operations.sample)
        errors = [None if found else refusal(item) for item, found in zip(self._slices, tokens, strict=True)]
        return [
            SliceResult(found, (), error, self._row(place) if found else None)
            for place, (found, error) in enumerate(zip(tokens, errors, strict=True))
        ]

    def _row(self, place: int) -> HiddenRow | None:
        return None if self._rows is None else HiddenRow(self._rows[place])


def _check(batch: ScheduledBatch) -> None:
    for item in batch.slices:
        if not item.token_ids:
            raise EngineFailure("a scheduled slice has no tokens")
        if len(item.next_token_ids) > len(item.token_ids):
            raise EngineFailure("a scheduled slice asks for more prompt log-probabilities than it has tokens")
        if item.num_drafts and not item.num_drafts + 1 == len(item.samples) <= len(item.token_ids):
            raise EngineFailure("a scheduled slice with drafts does not sample once after each and before the first")
