"""A decode step of one bucket as a program over memory that stays: inputs are copied in, it runs, outputs are read.

    inputs      PackedViews of one int32 tensor on the device
    outputs     best token of each row and its logit, into buffers that all programs share; logits where the program put them

`EagerProgram` runs the operations one by one. `CapturedProgram` ran them once while CUDA took notes, and replays those: one
launch for a step. The two run the same `_compute`; nothing in it depends on what is in the inputs, only on the bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from common.engine.attention import AttentionPlan, RowsAttention, Span
from common.engine.captured.buckets import Bucket
from common.engine.captured.packing import PackedViews, packed_size
from common.engine.kv_pool import KVPool
from common.engine.models import Model
from common.engine.step_input import StepInput

WARM_UPS = 2  # before capturing: kernels are compiled, libraries take their workspaces


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """Of the last program that ran; programs of one engine share them."""

    token_ids: torch.Tensor  # int32 [most rows], what placeholders of the next step refer to
    best: torch.Tensor  # fp32 [most rows]


class Program(Protocol):
    inputs: torch.Tensor
    hidden: torch.Tensor  # hidden rows behind the logits, as long valid as they are

    def run(self) -> torch.Tensor:
        """fp32 logits [rows, vocab], valid until any program of the engine runs again."""
        ...


class _RowsBackend:
    """An attention backend that knows the lengths of its rows as a tensor, and asks for no spans."""

    def __init__(self, attention: RowsAttention, lengths: torch.Tensor) -> None:
        self._attention = attention
        self._lengths = lengths

    def plan(self, block_tables: torch.Tensor, spans: Sequence[Span]) -> AttentionPlan:
        return self._attention.plan_rows(block_tables, self._lengths)


class EagerProgram:
    def __init__(self, bucket: Bucket, model: Model, pool: KVPool, attention: RowsAttention, outputs: StepOutputs) -> None:
        self.inputs = torch.zeros(packed_size(bucket), dtype=torch.int32, device=pool.device)
        self._bucket = bucket
        self._model = model
        self._pool = pool
        self._attention = attention
        self._outputs = outputs
        self.hidden = torch.empty(0)

    def run(self) -> torch.Tensor:
        return self._compute()

    def _compute(self) -> torch.Tensor:
        views = PackedViews(self.inputs.long(), self._bucket)  # one widening for all: indexes are of 64 bits
        drawn_before = self._outputs.token_ids.index_select(0, (-1 - views.token_ids).clamp_(min=0))
        step = StepInput(
            token_ids=torch.where(views.token_ids < 0, drawn_before.long(), views.token_ids),
            positions=views.positions,
            slots=views.slots,
            block_tables=views.block_tables,
            spans=(),
            entered=(),
        )
        hidden = self._model.forward(step, self._pool, _RowsBackend(self._attention, views.lengths))
        logits = self._model.logits(hidden)
        self.hidden = hidden
        best, token_ids = logits.max(dim=-1)
        self._outputs.token_ids[: self._bucket.rows].copy_(token_ids)
        self._outputs.best[: self._bucket.rows].copy_(best)
        return logits


class CapturedProgram(EagerProgram):
    """Made while nothing else runs on the device's current stream."""

    def __init__(
        self,
        bucket: Bucket,
        model: Model,
        pool: KVPool,
        attention: RowsAttention,
        outputs: StepOutputs,
        inputs: torch.Tensor,
        memory: Any,
    ) -> None:
        """`inputs` is a batch of padding on the host; `memory` a handle of `torch.cuda.graph_pool_handle`, shared by all."""
        super().__init__(bucket, model, pool, attention, outputs)
        self.inputs.copy_(inputs)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                self._compute()
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=memory):
            self._logits = self._compute()

    def run(self) -> torch.Tensor:
        self._graph.replay()
        return self._logits
