"""Computes steps: `ScheduledBatch` in, `ForwardResult` out.

    batch -> step input -> model forward (KV goes to the pool) -> logits of the rows that need them -> tokens, log-probabilities
       +----> masks of grammars, in a thread beside the forward -----------------------------------------+

Rows that need logits are the last row of a slice that samples, the rows of its drafts, and every row whose next token's
log-probability was asked for; the latter are worked off in groups, so that a long echoed prompt does not hold prompt x vocabulary
floats at once.

A step of single tokens goes another way where there are programs of fixed shape for it (`captured`): the same operations,
launched at once, and greedy tokens drawn on the device.

One thread uses a runner. It trusts the scheduler about blocks, and it knows neither requests nor who shares what.
"""

from __future__ import annotations

import copy
from concurrent.futures import Future
from typing import Protocol

import torch

from common.engine.attention import create_attention
from common.engine.batch import ForwardResult, SampleSpec, ScheduledBatch, SequenceSlice, SliceResult
from common.engine.captured.buckets import Bucket
from common.engine.captured.steps import DecodeSteps
from common.engine.grammar import MaskThread, NextMask
from common.engine.kv_pool import KVPool
from common.engine.models import LayerDone, Model
from common.engine.numerics import Numerics
from common.engine.step_input import StepBuffers, StepInput
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
    ) -> None:
        self.steps = steps
        self._model = model
        self._successor = successor
        self._pool = pool
        self._attention = create_attention(numerics.operations.attention, pool, num_heads)
        self._operations = numerics.operations
        self._buffers = StepBuffers(pool)
        self._mask_thread = MaskThread()

    @property
    def mask_readings(self) -> MaskReadings:
        return self._mask_thread.readings

    def without_steps(self) -> ModelRunner:
        """The same runner, which computes every step one operation after the other."""
        other = copy.copy(self)
        other.steps = None
        return other

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch, layer_done: LayerDone | None = None) -> ForwardResult:
        """Computes one step. Blocks until its tokens are on the host; calls `layer_done` from within, on this thread."""
        if not batch.slices:
            return ForwardResult()
        _check(batch)
        if self.steps is not None and layer_done is None and (bucket := self.steps.bucket_of(batch)) is not None:
            return self._execute_at_once(self.steps, batch, bucket)
        masks = [mask for item in batch.slices for mask in _masks(item)]
        working_out = self._mask_thread.begin(masks)
        step, hidden = self._forward(batch, layer_done)
        prompt_logprobs = [
            self._prompt_logprobs(item, hidden[span.first_row : span.first_row + span.num_rows])
            for item, span in zip(batch.slices, step.spans, strict=True)
        ]
        _wait_for(working_out)
        tokens = self._sample(batch, step, hidden)
        errors = [None if found else refusal(item) for item, found in zip(batch.slices, tokens, strict=True)]
        return ForwardResult(tuple(SliceResult(*parts) for parts in zip(tokens, prompt_logprobs, errors, strict=True)))

    def _execute_at_once(self, steps: DecodeSteps, batch: ScheduledBatch, bucket: Bucket) -> ForwardResult:
        pending = steps.launch(batch, bucket)
        if all(_is_greedy(spec) for item in batch.slices for spec in item.samples):
            token_ids = pending.token_ids()
            results = [
                SliceResult((SampledToken(token_id, None),) if item.samples else ())
                for item, token_id in zip(batch.slices, token_ids, strict=True)
            ]
            return ForwardResult(tuple(results))
        _wait_for(self._mask_thread.begin([mask for item in batch.slices for mask in _masks(item)]))
        rows = [row for row, item in enumerate(batch.slices) if item.samples]
        logits = pending.logits()
        tokens = draw(logits if len(rows) == len(logits) else logits[rows], batch.slices, self._operations.sample)
        errors = [None if found else refusal(item) for item, found in zip(batch.slices, tokens, strict=True)]
        return ForwardResult(tuple(SliceResult(found, (), error) for found, error in zip(tokens, errors, strict=True)))

    @torch.inference_mode()
    def compute_logits(self, batch: ScheduledBatch) -> torch.Tensor:
        """Computes one step and returns the fp32 logits after the last token of each slice: [slices, vocab]."""
        _check(batch)
        step, hidden = self._forward(batch)
        return self._model.logits(hidden[[span.first_row + span.num_rows - 1 for span in step.spans]])

    @torch.inference_mode()
    def compute_all_logits(self, batch: ScheduledBatch) -> torch.Tensor:
        """Computes one step and returns the fp32 logits after every token, slice by slice: [tokens, vocab]."""
        _check(batch)
        _, hidden = self._forward(batch)
        return self._model.logits(hidden)

    def _forward(self, batch: ScheduledBatch, layer_done: LayerDone | None = None) -> tuple[StepInput, torch.Tensor]:
        if self._successor is not None and (model := self._successor.poll()) is not None:
            self._model, self._successor = model, None
        step = self._buffers.fill(batch)
        for block, filled in step.entered:
            self._pool.clear_tail(block, filled)
        if layer_done is None or self._pool.device.type == "cpu":
            return step, self._model.forward(step, self._pool, self._attention, layer_done)
        return step, self._forward_on_device(step, layer_done)

    def _forward_on_device(self, step: StepInput, layer_done: LayerDone) -> torch.Tensor:
        """The host is far ahead of the device: a layer is reported when the device is through with it, all being queued."""
        marks: list[tuple[int, torch.cuda.Event]] = []

        def mark(num_layers: int) -> None:
            event = torch.cuda.Event()
            event.record()
            marks.append((num_layers, event))

        hidden = self._model.forward(step, self._pool, self._attention, mark)
        for num_layers, event in marks:
            event.synchronize()
            layer_done(num_layers)
        return hidden

    def _sample(self, batch: ScheduledBatch, step: StepInput, hidden: torch.Tensor) -> list[tuple[SampledToken, ...]]:
        rows: list[int] = []
        for item, span in zip(batch.slices, step.spans, strict=True):
            end = span.first_row + span.num_rows
            rows.extend(range(end - num_sampled_rows(item), end))
        if not rows:
            return [() for _ in batch.slices]
        logits = self._model.logits(hidden[torch.tensor(rows, device=hidden.device)])
        return draw(logits, batch.slices, self._operations.sample)

    def _prompt_logprobs(self, item: SequenceSlice, hidden: torch.Tensor) -> tuple[TokenLogprob, ...]:
        if item.prompt_logprobs is None:
            return ()
        reports: list[TokenLogprob] = []
        for start in range(0, len(item.next_token_ids), _LOGPROB_ROWS):
            following = item.next_token_ids[start : start + _LOGPROB_ROWS]
            logits = self._model.logits(hidden[start : start + len(following)])
            reports.extend(self._operations.report_logprobs(logits, following, [item.prompt_logprobs] * len(following)))
        return tuple(reports)


def _is_greedy(spec: SampleSpec) -> bool:
    return spec.temperature == 0.0 and spec.rules is None and spec.logprobs is None


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
