"""A decode step of one bucket as programs over memory that stays: inputs are copied in, they run, outputs are read.

    inputs      one int32 tensor on the device, see `packing`
    run         model, logits, best token of each row
    draw        behind it, where a row is not greedy: other tokens from the same logits, edited first if there are edits
    outputs     logits, token of each row and its logit, in buffers that all programs share

A program is some work, which `Record` makes repeatable: `as_it_is` does it one operation after the other, `GraphRecorder` has
CUDA take notes of it once, and replays those: one launch. Nothing in that work depends on what the inputs hold, only on the
bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from common.engine.attention import AttentionPlan, RowsAttention, Span
from common.engine.captured.buckets import Bucket
from common.engine.captured.drawing import Filters
from common.engine.captured.packing import PackedViews, edits_of_rows, settings_of_rows, step_words
from common.engine.kv_pool import KVPool
from common.engine.models import Model
from common.engine.operations import RowDraws
from common.engine.step_input import StepInput, StepTensors

WARM_UPS = 2  # before capturing: kernels are compiled, libraries take their workspaces

Work = Callable[[], None]
Record = Callable[[Work], Work]
"""Given some work, what does it as often as it is called, with whatever is in memory then."""


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """Of the last program that ran; programs of one engine share them."""

    logits: torch.Tensor  # fp32 [most rows, vocab]
    token_ids: torch.Tensor  # int32 [most rows], what placeholders of the next step refer to
    best: torch.Tensor  # fp32 [most rows]; not a number where there is no token


def as_it_is(work: Work) -> Work:
    return work


class GraphRecorder:
    """Records while nobody else computes on this thread's stream. Graphs share memory: they are to run one after the other."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()
        here = torch.cuda.current_stream()
        # The default stream cannot be captured. Any other is itself: it may stand for a part of the device.
        self._stream = torch.cuda.Stream() if here == torch.cuda.default_stream() else here

    def __call__(self, work: Work) -> Work:
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                work()
        here.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process, those that move KV for one, may take memory meanwhile.
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


class _RowsBackend:
    """An attention backend that knows the lengths of its rows as a tensor, and asks for no spans."""

    def __init__(self, attention: RowsAttention, lengths: torch.Tensor) -> None:
        self._attention = attention
        self._lengths = lengths

    def plan(self, block_tables: torch.Tensor, spans: Sequence[Span]) -> AttentionPlan:
        return self._attention.plan_rows(block_tables, self._lengths)


class Program:
    def __init__(
        self,
        bucket: Bucket,
        model: Model,
        pool: KVPool,
        attention: RowsAttention,
        draws: RowDraws | None,
        outputs: StepOutputs,
        padding: torch.Tensor,
        record: Record,
    ) -> None:
        """`padding` are the packed inputs of an empty batch. Without `draws` there are greedy tokens only."""
        self.inputs = padding.to(pool.device, copy=True)
        self.hidden = torch.empty(0)  # rows behind the logits, as long valid as they are
        self._bucket = bucket
        self._model = model
        self._pool = pool
        self._attention = attention
        self._outputs = outputs
        self._run = record(self._compute)
        self._edit: Work | None = None
        self._draw: dict[Filters, Work] = {}
        if draws is not None:
            self._edit = record(lambda: draws.edit(outputs.logits, edits_of_rows(self.inputs, bucket)))
            self._draw = {filters: record(lambda filters=filters: self._draw_rows(draws, filters)) for filters in Filters}  # type: ignore[misc]

    def run(self) -> None:
        self._run()

    def draw(self, filters: Filters, *, edits: bool) -> None:
        """Other tokens than the best ones, from the logits of the last run."""
        if edits and self._edit is not None:
            self._edit()
        self._draw[filters]()

    def _compute(self) -> None:
        packed = self.inputs[: step_words(self._bucket)].long()  # one widening for all: indexes are of 64 bits
        views = PackedViews(packed, self._bucket)
        drawn_before = self._outputs.token_ids.index_select(0, (-1 - views.token_ids).clamp_(min=0))
        tensors = StepTensors(
            token_ids=torch.where(views.token_ids < 0, drawn_before.long(), views.token_ids),
            positions=views.positions,
            slots=views.slots,
            block_tables=views.block_tables,
        )
        step = StepInput(lambda: tensors)
        rows = self._bucket.rows
        self.hidden = self._model.forward(step, self._pool, _RowsBackend(self._attention, views.lengths))
        logits = self._outputs.logits[:rows]
        logits.copy_(self._model.logits(self.hidden))
        best, token_ids = logits.max(dim=-1)
        self._outputs.token_ids[:rows].copy_(token_ids)
        self._outputs.best[:rows].copy_(best)

    def _draw_rows(self, draws: RowDraws, filters: Filters) -> None:
        rows, (top_k, top_p) = self._bucket.rows, filters.value
        settings = settings_of_rows(self.inputs, self._bucket)
        drawn = draws.draw(self._outputs.logits[:rows], settings, any_top_k=top_k, any_top_p=top_p)
        # What is no token is told by its logit; the next step may look it up before anybody has read that.
        self._outputs.token_ids[:rows].copy_(drawn.clamp(min=0))
        self._outputs.best[:rows].masked_fill_(drawn < 0, torch.nan)
