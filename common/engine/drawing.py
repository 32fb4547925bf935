"""What is drawn from the logits of a batch, and what is reported of them.

    batch -> rows of which logits are wanted, in groups -> (whoever computes) -> logits -> tokens, log-probabilities, rows kept
       +----> masks of grammars, in a thread beside the computation --------------------------^

Rows that need logits are the last row of a slice that samples, the rows of its drafts, and every row whose next token's
log-probability was asked for; the latter are worked off in groups, so that a long echoed prompt does not hold prompt x vocabulary
floats at once. It does not know who computes, nor where.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from itertools import accumulate

import torch

from common.engine.batch import ForwardResult, ScheduledBatch, SequenceSlice, SliceResult
from common.engine.grammar import MaskThread, NextMask
from common.engine.heads.rows import hidden_rows
from common.engine.operations import Operations
from common.engine.verification import draw, num_sampled_rows, refusal
from common.types import TokenLogprob

_LOGPROB_ROWS = 64


class Drawing:
    """Of one batch; made before it is computed, which is when its masks begin to be worked out."""

    def __init__(self, batch: ScheduledBatch, operations: Operations, masks: MaskThread) -> None:
        self._batch = batch
        self._operations = operations
        self._working_out = masks.begin([mask for item in batch.slices for mask in masks_of(item)])
        first_rows = list(accumulate((len(item.token_ids) for item in batch.slices), initial=0))
        self._reported = [_reported_rows(item, first) for item, first in zip(batch.slices, first_rows, strict=False)]
        self._sampled = [
            row
            for item, end in zip(batch.slices, first_rows[1:], strict=True)
            for row in range(end - num_sampled_rows(item), end)
        ]

    @property
    def wanted(self) -> list[Sequence[int]]:
        """Rows of which logits are wanted, in groups."""
        reported: list[Sequence[int]] = [rows for groups in self._reported for rows in groups]
        return reported + ([self._sampled] if self._sampled else [])

    @property
    def kept(self) -> Sequence[int]:
        """Rows whose hidden state is wanted."""
        return self._sampled if self._batch.keeps_rows else ()

    @torch.inference_mode()
    def draw(self, logits: Iterator[torch.Tensor]) -> ForwardResult:
        """`logits` of each group that is `wanted`, and behind them the hidden rows that are `kept`, if any."""
        slices = self._batch.slices
        prompt_logprobs = [
            _prompt_logprobs(item, len(groups), logits, self._operations)
            for item, groups in zip(slices, self._reported, strict=True)
        ]
        wait_for(self._working_out)
        tokens = draw(next(logits), slices, self._operations.sample) if self._sampled else [() for _ in slices]
        errors = [None if found else refusal(item) for item, found in zip(slices, tokens, strict=True)]
        rows = hidden_rows(next(logits), slices, tokens) if self.kept else [None] * len(tokens)
        return ForwardResult(tuple(SliceResult(*parts) for parts in zip(tokens, prompt_logprobs, errors, rows, strict=True)))

    def give_up(self) -> None:
        """Nothing is drawn, and nobody works masks out any more."""
        wait_for(self._working_out)


def wait_for(working_out: Future[None] | None) -> None:
    """A thread that found no core so far would be waited for: this one has nothing else to do."""
    if working_out is not None and not working_out.cancel():
        working_out.result()


def masks_of(item: SequenceSlice) -> list[NextMask]:
    """Choices that draw from one row may share a mask."""
    return [spec.rules.mask for spec in item.samples if spec.rules is not None and spec.rules.mask is not None]


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
