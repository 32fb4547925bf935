"""Decode steps through programs of fixed shape: what the runner asks whether it has one, and launches.

    launch(batch) -> PendingStep      returns at once on a GPU; the inputs of two steps may be under way
    pending.token_ids()               waits for one event, and checks that what was drawn is a number

A batch goes this way if every sequence has one token, guesses nothing and asks for no log-probabilities of its prompt, and if a
bucket holds it. Greedy tokens are drawn by the program; what else there is to draw is drawn from its logits, as always.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from common.blocks import num_blocks
from common.engine.attention import RowsAttention
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.captured.buckets import Bucket, Buckets
from common.engine.captured.packing import PackedRows
from common.engine.captured.programs import CapturedProgram, EagerProgram, Program, StepOutputs
from common.engine.kv_pool import KVPool
from common.engine.models import Model
from common.errors import EngineFailure

IN_FLIGHT = 2  # steps whose inputs may not be written over yet


class PendingStep:
    def __init__(
        self, num_rows: int, logits: torch.Tensor, hidden: torch.Tensor, on_host: torch.Tensor, copied: torch.cuda.Event | None
    ) -> None:
        self._num_rows = num_rows
        self._logits = logits
        self._hidden = hidden
        self._on_host = on_host
        self._copied = copied

    def wait(self) -> None:
        """Until the step is computed and its tokens are on the host."""
        if self._copied is not None:
            self._copied.synchronize()

    def logits(self) -> torch.Tensor:
        """Of the batch's rows; valid until the next launch."""
        return self._logits[: self._num_rows]

    def rows(self) -> torch.Tensor:
        """A copy of the batch's hidden rows; to be taken before the next launch."""
        return self._hidden[: self._num_rows].clone()

    def token_ids(self) -> list[int]:
        """The best token of each row. Raises EngineFailure if a row has none."""
        self.wait()
        values = self._on_host[:, : self._num_rows].numpy()
        if not np.isfinite(values[1].view(np.float32)).all():
            raise EngineFailure("the model's logits are not finite")
        token_ids: list[int] = values[0].tolist()
        return token_ids


class _Lane:
    """Host memory of one step in flight."""

    def __init__(self, bucket: Bucket, pool: KVPool, scratch_block: int) -> None:
        on_gpu = pool.device.type == "cuda"
        self.inputs = PackedRows(bucket, pool.layout.block_tokens, scratch_block, pinned=on_gpu)
        self.outputs = torch.zeros(2, bucket.rows, dtype=torch.int32, pin_memory=on_gpu)
        self.fresh = torch.zeros(bucket.rows, dtype=torch.int64, pin_memory=on_gpu)
        self.done = torch.cuda.Event() if on_gpu else None


class DecodeSteps:
    """One per engine, used by its thread. Programs are made by `prepare`, or when a bucket is first asked for."""

    def __init__(
        self, model: Model, pool: KVPool, attention: RowsAttention, buckets: Buckets, scratch_block: int, *, capture: bool
    ) -> None:
        """`scratch_block` belongs to no sequence: padding is written there."""
        self._model = model
        self._pool = pool
        self._attention = attention
        self._buckets = buckets
        self._scratch_block = scratch_block
        self._programs: dict[Bucket, Program] = {}
        self._lanes: dict[Bucket, list[_Lane]] = {}
        self._memory = torch.cuda.graph_pool_handle() if capture else None
        most_rows = buckets.rows[-1]
        # Both as 32 bits in one tensor: one copy brings tokens and logits to the host.
        both = torch.zeros(2, most_rows, dtype=torch.int32, device=pool.device)
        self._both = both
        self._outputs = StepOutputs(both[0], both[1].view(torch.float32))

    @torch.inference_mode()
    def prepare(self) -> None:
        """Makes every program. Raises RuntimeError, as torch does, if CUDA cannot capture one."""
        for bucket in self._buckets.all():
            self.program(bucket)

    def bucket_of(self, batch: ScheduledBatch) -> Bucket | None:
        if not all(_is_plain(item) for item in batch.slices):
            return None
        longest = max((item.start for item in batch.slices), default=0) + 1
        return self._buckets.bucket_for(len(batch.slices), num_blocks(longest, self._pool.layout.block_tokens))

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch, bucket: Bucket) -> PendingStep:
        """`bucket` is that of the batch. Token ids below zero are placeholders, see `packing`."""
        program = self.program(bucket)
        lanes = self._lanes[bucket]
        lane = lanes.pop(0)
        lanes.append(lane)
        if lane.done is not None:
            lane.done.synchronize()  # two steps ago: over, unless somebody launches without reading
        self._clear(lane, lane.inputs.fill(batch.slices))
        program.inputs.copy_(lane.inputs.tensor, non_blocking=True)
        logits = program.run()
        lane.outputs.copy_(self._both[:, : bucket.rows], non_blocking=True)
        if lane.done is not None:
            lane.done.record()
        return PendingStep(len(batch.slices), logits, program.hidden, lane.outputs, lane.done)

    def _clear(self, lane: _Lane, blocks: Sequence[int]) -> None:
        """Blocks that a sequence enters are zeroed whole: its first token in there is written by this step."""
        if blocks:
            fresh = lane.fresh[: len(blocks)]
            fresh.copy_(torch.tensor(blocks))
            self._pool.tensor.index_fill_(0, fresh.to(self._pool.device, non_blocking=True), 0)

    def program(self, bucket: Bucket) -> Program:
        program = self._programs.get(bucket)
        if program is None:
            lanes = [_Lane(bucket, self._pool, self._scratch_block) for _ in range(IN_FLIGHT)]
            parts = (bucket, self._model, self._pool, self._attention, self._outputs)
            if self._memory is None:
                program = EagerProgram(*parts)
            else:
                program = CapturedProgram(*parts, lanes[0].inputs.tensor, self._memory)
            self._programs[bucket], self._lanes[bucket] = program, lanes
        return program


def _is_plain(item: SequenceSlice) -> bool:
    return len(item.token_ids) == 1 and not item.num_drafts and item.prompt_logprobs is None and len(item.samples) <= 1
