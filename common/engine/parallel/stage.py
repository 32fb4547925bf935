"""One share of a model at work: its part of a step, between what comes from the stage before and what goes to the next.

    previous stage, same shard  -- hidden rows -->  layers of this share  -- hidden rows -->  next stage, same shard
                                                    sums within the stage                     or, at the end, logits

Used by rank 0 and by the others alike. It knows neither processes nor who is asked for what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.engine.attention import AttentionBackend
from common.engine.batch import ScheduledBatch
from common.engine.device_memory import DeviceAllocation
from common.engine.kv_pool import KVPool
from common.engine.layers_done import told_when_computed
from common.engine.models import LayerDone, Model
from common.engine.parallel.connections import Connections
from common.engine.parallel.micro_batches import cut, num_micro_batches
from common.engine.parallel.share import Share
from common.engine.step_input import StepBuffers
from common.engine.swap_region import SwapRegion
from common.errors import EngineFailure


@dataclass(frozen=True, slots=True)
class Pipeline:
    """How a share is connected to the stages beside its own."""

    num_stages: int
    least_tokens: int  # of a micro-batch
    connections: Connections
    row_width: int  # of hidden rows on their way
    row_dtype: torch.dtype


class StageShare:
    def __init__(
        self,
        share: Share,
        model: Model,
        pool: KVPool,
        attention: AttentionBackend,
        pipeline: Pipeline,
        device_memory: DeviceAllocation | None = None,
    ) -> None:
        """`device_memory` is the pool's, on a GPU."""
        self.share = share
        self.pool = pool
        self.device_memory = device_memory
        self.model = model
        self._attention = attention
        self._pipeline = pipeline
        self._buffers = StepBuffers(pool)
        self._swap_region: SwapRegion | None = None

    @torch.inference_mode()
    def compute(self, batch: ScheduledBatch, layer_done: LayerDone | None = None) -> torch.Tensor | None:
        """Computes this share's layers for all rows of a step; the hidden rows if it is of the last stage. `layer_done` is told
        the number of this stage's layers whose keys and values are in the pool, those of the other shards as well: none of them
        has come past a layer's sum before all have stored theirs."""
        pipeline = self._pipeline
        count = num_micro_batches(batch.num_tokens, pipeline.num_stages, pipeline.least_tokens)
        parts = cut(batch, count) if count > 1 else [batch]
        hidden = [self.compute_part(part, layer_done if part is parts[-1] else None) for part in parts]
        return torch.cat([rows for rows in hidden if rows is not None]) if self.share.is_last else None

    @torch.inference_mode()
    def compute_part(self, part: ScheduledBatch, layer_done: LayerDone | None = None) -> torch.Tensor | None:
        """The same of a step, or of a part of one, which is not cut any further."""
        pipeline, connections = self._pipeline, self._pipeline.connections
        rows = None
        if connections.previous is not None:
            rows = torch.empty(part.num_tokens, pipeline.row_width, dtype=pipeline.row_dtype, device=self.pool.device)
            connections.previous.receive(rows)
        step = self._buffers.fill(part)
        for block, filled in step.entered:
            self.pool.clear_tail(block, filled)
        with told_when_computed(layer_done, self.pool.device) as queued:
            hidden = self.model.forward(step, self.pool, self._attention, queued, rows)
        if connections.following is None:
            return hidden
        connections.following.send(hidden)
        return None

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Of this share's part of the vocabulary: fp32 [rows, part]."""
        return self.model.logits(hidden[torch.tensor(rows, device=hidden.device)]).contiguous()

    @torch.inference_mode()
    def rows(self, hidden: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Some of the hidden rows, which all shards of a stage have whole."""
        return hidden[torch.tensor(rows, device=hidden.device)].contiguous()

    def no_rows(self, count: int) -> torch.Tensor:
        """Memory of the host for so many hidden rows."""
        return torch.empty(count, self._pipeline.row_width, dtype=self._pipeline.row_dtype)

    def settle(self) -> None:
        """Until nothing of this share is computed any more: on a GPU all is only queued."""
        if self.pool.device.type == "cuda":
            torch.cuda.synchronize(self.pool.device)

    def connect(self) -> None:
        """As `Connections.connect`."""
        self._pipeline.connections.connect()

    def abort(self) -> None:
        """As `Connections.abort`."""
        self._pipeline.connections.abort()

    def close(self) -> None:
        """As `Connections.close`."""
        self._pipeline.connections.close()

    @torch.inference_mode()
    def copy_block(self, source: int, destination: int) -> None:
        self.pool.copy_block(source, destination)

    def make_swap_region(self, num_slots: int) -> None:
        """In place of the one before; 0 = none."""
        self._swap_region = SwapRegion(self.pool, num_slots * self.pool.layout.block_bytes) if num_slots else None

    def move(self, brought_in: Sequence[tuple[int, int]], put_out: Sequence[tuple[int, int]]) -> None:
        """As `SwapSpace.move`, of this share's part of the blocks."""
        if self._swap_region is None:
            raise EngineFailure("blocks are to be moved where there is no swap region")
        self._swap_region.move(brought_in, put_out)
