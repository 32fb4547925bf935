"""Computes steps: `ScheduledBatch` in, `ForwardResult` out.

    batch -> step input -> model forward (KV goes to the pool) -> logits of the rows that need them -> tokens, log-probabilities
       +----> masks of grammars, in a thread beside the forward -----------------------------------------+

Rows that need logits are the last row of a slice that samples, the rows of its drafts, and every row whose next token's
log-probability was asked for; the latter are worked off in groups, so that a long echoed prompt does not hold prompt x vocabulary
floats at once.

Where several processes compute as one (`StepGroup`), the forward and the logits are theirs, and sampling stays here.

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
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, chain
from typing import Protocol

import numpy as np
import torch

from common.engine.attention import create_attention
from common.engine.batch import ForwardResult, ScheduledBatch, SequenceSlice, SliceResult
from common.engine.captured.buckets import Bucket
from common.engine.captured.steps import DecodeSteps, PendingStep
from common.engine.grammar import MaskThread, NextMask
from common.engine.heads.rows import HiddenRow, hidden_rows
from common.engine.in_flight_step import InFlightStep, ThreadStep, has_placeholders, with_tokens_of
from common.engine.kv_pool import KVPool
from common.engine.layers_done import told_when_computed
from common.engine.models import LayerDone, Model
from common.engine.numerics import Numerics
from common.engine.operations import Operations
from common.engine.profile.stopwatch import Stopwatch
from common.engine.step_input import StepBuffers
from common.engine.stopping import StepStopped
from common.engine.to_device import to_device
from common.engine.verification import draw, num_sampled_rows, refusal
from common.errors import EngineFailure
from common.metrics import MaskReadings
from common.types import SampledToken, TokenLogprob

_LOGPROB_ROWS = 64


class Successor(Protocol):
    """Knows of a model that is to take over between two steps, over the same pool."""

    def poll(self) -> Model | None:
        """That model, once it is ready; never blocks."""
        ...


class StepGroup(Protocol):
    """Several processes that compute as one (`common.engine.parallel.group`)."""

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
        self._model = model
        self._successor = successor
        self._group = group
        self._pool = pool
        self._attention = create_attention(numerics.operations.attention, pool, num_heads)
        self._operations = numerics.operations
        self._buffers = StepBuffers(pool)
        self._mask_thread = MaskThread()
        self._computing: ThreadPoolExecutor | None = None
        self._latest: ThreadStep | _DeviceStep | None = None  # that was launched

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
        self._model = stopwatch.around(model, forward="layers", logits="head")
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
        if self._bucket_of(batch, layer_done) is not None or not self._is_at_rest or has_placeholders(batch):
            return self.launch(batch, layer_done).collect()
        self._latest = None
        return self._execute(batch, layer_done)

    def launch(self, batch: ScheduledBatch, layer_done: LayerDone | None = None) -> InFlightStep:
        """Has one step computed, behind the one that was launched before; that is to be collected before the next launch.
        `layer_done` is called when the step is collected."""
        _check(batch)
        bucket = self._bucket_of(batch, layer_done)
        if self.steps is not None and bucket is not None:
            self._latest = self._launch_on_device(self.steps, batch, bucket)
            return self._latest
        if self._computing is None:
            self._computing = ThreadPoolExecutor(
                1, thread_name_prefix="compute steps", initializer=_on_the_stream_of_here(self._pool.device)
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

    @torch.inference_mode()
    def _execute(self, batch: ScheduledBatch, layer_done: LayerDone | None) -> ForwardResult:
        masks = [mask for item in batch.slices for mask in _masks(item)]
        working_out = self._mask_thread.begin(masks)
        first_rows = list(accumulate((len(item.token_ids) for item in batch.slices), initial=0))
        reported = [_reported_rows(item, first) for item, first in zip(batch.slices, first_rows, strict=False)]
        sampled = [
            row
            for item, end in zip(batch.slices, first_rows[1:], strict=True)
            for row in range(end - num_sampled_rows(item), end)
        ]
        wanted = [rows for groups in reported for rows in groups] + ([sampled] if sampled else [])
        kept = sampled if batch.keeps_rows else ()
        try:
            logits = self._compute(batch, wanted, layer_done, kept)
        except StepStopped:
            _wait_for(working_out)
            raise
        prompt_logprobs = [
            _prompt_logprobs(item, len(groups), logits, self._operations)
            for item, groups in zip(batch.slices, reported, strict=True)
        ]
        _wait_for(working_out)
        tokens = draw(next(logits), batch.slices, self._operations.sample) if sampled else [() for _ in batch.slices]
        errors = [None if found else refusal(item) for item, found in zip(batch.slices, tokens, strict=True)]
        rows = hidden_rows(next(logits), batch.slices, tokens) if kept else [None] * len(tokens)
        return ForwardResult(tuple(SliceResult(*parts) for parts in zip(tokens, prompt_logprobs, errors, rows, strict=True)))

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
        if self._successor is not None and (model := self._successor.poll()) is not None:
            self._model, self._successor = model, None
        step = self._buffers.fill(batch)
        for block, filled in step.entered:
            self._pool.clear_tail(block, filled)
        model, device = self._model, self._pool.device
        # Before the layers, so that nothing is copied between them and the head. None: all rows; none is wanted twice.
        indexes = [
            None if len(rows) == len(step.token_ids) else to_device(np.array(rows, dtype=np.int64), device)
            for rows in (*wanted, *([kept] if kept else []))
        ]
        with told_when_computed(layer_done, device) as told:
            hidden = model.forward(step, self._pool, self._attention, told)
        chosen = [hidden if index is None else hidden[index] for index in indexes[len(wanted) :]]
        found = (model.logits(hidden if index is None else hidden[index]) for index in indexes[: len(wanted)])
        return chain(found, chosen)


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

    def settle(self) -> None:
        self._pending.wait()

    def _drawn_there(self) -> Iterator[SliceResult]:
        for place, (item, token_id) in enumerate(zip(self._slices, self._pending.token_ids(), strict=True)):
            yield SliceResult((SampledToken(token_id, None),), row=self._row(place)) if item.samples else SliceResult()

    @torch.inference_mode()
    def _drawn_here(self) -> list[SliceResult]:
        _wait_for(self._masks.begin([mask for item in self._slices for mask in _masks(item)]))
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


def _reported_rows(item: SequenceSlice, first_row: int) -> list[range]:
    """The rows whose next token's log-probability was asked for, in groups."""
    if item.prompt_logprobs is None:
        return []
    end = first_row + len(item.next_token_ids)
    return [range(row, min(row + _LOGPROB_ROWS, end)) for row in range(first_row, end, _LOGPROB_ROWS)]


def _prompt_logprobs(
    item: SequenceSlice, num_groups: int, logits: Iterator[torch.Tensor], operations: Operations
) -> tuple[TokenLogprob, ...]:
    if item.prompt_logprobs is None:
        return ()
    reports: list[TokenLogprob] = []
    for group in range(num_groups):
        following = item.next_token_ids[group * _LOGPROB_ROWS : (group + 1) * _LOGPROB_ROWS]
        reports.extend(operations.report_logprobs(next(logits), following, [item.prompt_logprobs] * len(following)))
    return tuple(reports)


def _on_the_stream_of_here(device: torch.device) -> Callable[[], None]:
    """Has another thread queue its work where this one does: so it runs in the order in which it was queued."""
    if device.type != "cuda":
        return lambda: None
    stream = torch.cuda.current_stream(device)
    return lambda: torch.cuda.set_stream(stream)


def _wait_for(working_out: Future[None] | None) -> None:
    """A thread that found no core so far would be waited for: this one has nothing else to do."""
    if working_out is not None and not working_out.cancel():
        working_out.result()


def _masks(item: SequenceSlice) -> list[NextMask]:
    """Choices that draw from one row may share a mask."""
    return [spec.rules.mask for spec in item.samples if spec.rules is not None and spec.rules.mask is not None]


def _check(batch: ScheduledBatch) -> None:
    for item in batch.slices:
        if not item.token_ids:
            raise EngineFailure("a scheduled slice has no tokens")
        if len(item.next_token_ids) > len(item.token_ids):
            raise EngineFailure("a scheduled slice asks for more prompt log-probabilities than it has tokens")
        if item.num_drafts and not item.num_drafts + 1 == len(item.samples) <= len(item.token_ids):
            raise EngineFailure("a scheduled slice with drafts does not sample once after each and before the first")
