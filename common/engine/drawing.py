"""What is drawn from the logits of a batch, and what is reported of them.

    batch -> rows of which logits are wanted, in groups -> (whoever computes) -> logits -> tokens, log-probabilities, rows kept
       |                                                                         best tokens ->
       +----> masks of grammars, in a thread beside the computation --------------------------^

Where nothing but best tokens is wanted of a step, masked or not, and the model can pick them while it computes its head
(`TokenPicker`), there are no logits.

Rows that need logits are the last row of a slice that samples, the rows of its drafts, and every row whose next token's
log-probability was asked for; the latter are worked off in groups, so that a long echoed prompt does not hold prompt x vocabulary
floats at once. It does not know who computes, nor where.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import torch

from common.engine.batch import ForwardResult, ScheduledBatch, SequenceSlice, SliceResult
from common.engine.grammar import MaskThread, NextMask
from common.engine.heads.rows import HiddenRow, hidden_rows
from common.engine.models import TokenPicker
from common.engine.operations import Operations
from common.engine.verification import draw, follow, num_sampled_rows, refusal
from common.errors import EngineFailure
from common.types import SampledToken, TokenLogprob

_LOGPROB_ROWS = 64


class Drawing:
    """Of one batch; made before it is computed, which is when its masks begin to be worked out."""

    def __init__(self, batch: ScheduledBatch, operations: Operations, masks: MaskThread) -> None:
        self._batch = batch
        self._operations = operations
        self._working_out = masks.begin([mask for item in batch.slices for mask in masks_of(item)])
        self._reported: list[list[range]] = []  # of each slice
        self._sampled: list[int] = []
        end = 0
        for item in batch.slices:
            first, end = end, end + len(item.token_ids)
            self._reported.append(_reported_rows(item, first))
            self._sampled += range(end - num_sampled_rows(item), end)

    @property
    def takes_best(self) -> bool:
        """Whether nothing is wanted but the best token of each row of which logits are."""
        return (
            bool(self._sampled)
            and not any(self._reported)
            and all(
                len(item.samples) in (0, item.num_drafts + 1) and all([spec.takes_best for spec in item.samples])
                for item in self._batch.slices
            )
        )

    @property
    def sampled(self) -> Sequence[int]:
        """Rows that tokens are drawn from."""
        return self._sampled

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
        rows = hidden_rows(next(logits), slices, tokens) if self.kept else [None] * len(tokens)
        return self._result(tokens, prompt_logprobs, rows)

    def pick(self, picker: TokenPicker, hidden: torch.Tensor) -> ForwardResult:
        """Where it `takes_best`; `hidden` are the rows that are `sampled`."""
        wait_for(self._working_out)
        masks = [spec.mask for item in self._batch.slices for spec in item.samples]
        # Where none may come nothing is drawn; the rows of others go on.
        best = picker.pick(hidden, [None if mask is None or mask.error is not None else mask.words for mask in masks])
        if min(best) < 0:
            raise EngineFailure("the model's logits are not finite")
        slices = self._batch.slices
        tokens = follow(slices, best)
        rows = hidden_rows(hidden, slices, tokens) if self._batch.keeps_rows else [None] * len(tokens)
        return self._result(tokens, [()] * len(tokens), rows)

    def _result(
        self,
        tokens: Sequence[tuple[SampledToken, ...]],
        prompt_logprobs: Sequence[tuple[TokenLogprob, ...]],
        rows: Sequence[HiddenRow | None],
    ) -> ForwardResult:
        errors = [None if found else refusal(item) for item, found in zip(self._batch.slices, tokens, strict=True)]
        return ForwardResult(tuple(map(SliceResult, tokens, prompt_logprobs, errors, rows)))

    def give_up(self) -> None:
        """Nothing is drawn, and nobody works masks out any more."""
        wait_for(self._working_out)


def wait_for(working_out: Future[None] | None) -> None:
    """A thread that found no core so far would be waited for: this one has nothing else to do."""
    if working_out is not None and not working_out.cancel():
        working_out.result()


def masks_of(item: SequenceSlice) -> list[NextMask]:
    """Choices that draw from one row may share a mask."""
    return [spec.mask for spec in item.samples if spec.mask is not None]


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
