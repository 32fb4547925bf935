"""Decode steps through programs of fixed shape: what the runner asks whether it has one, and launches.

    launch(batch) -> PendingStep      returns at once on a GPU; the inputs of two steps may be under way
    pending.token_ids()               waits for one event, and checks that what was drawn is a number

A batch goes this way if every sequence has one token, guesses nothing and asks for no log-probabilities of its prompt, and if a
bucket holds it. Its tokens are drawn on the device behind its logits, or for the reasons that `drawing` has, by the runner.
"""

from __future__ import annotations

import gc
from collections import Counter

import numpy as np
import torch

from common.blocks import num_blocks
from common.engine.attention import RowsAttention
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.captured.buckets import Bucket, Buckets
from common.engine.captured.drawing import DrawPlan, OnHost, plan_draws
from common.engine.captured.packing import PackedRows, PackedViews, step_words
from common.engine.captured.programs import GraphRecorder, Program, Record, StepOutputs, as_it_is
from common.engine.kv_pool import KVPool
from common.engine.models import Model
from common.engine.operations import RowDraws
from common.errors import EngineFailure

IN_FLIGHT = 2  # steps whose inputs may not be written over yet


class PendingStep:
    def __init__(
        self,
        num_rows: int,
        logits: torch.Tensor,
        hidden: torch.Tensor,
        on_host: torch.Tensor,
        copied: torch.cuda.Event | None,
        obstacle: OnHost | None,
    ) -> None:
        self.obstacle = obstacle
        """Why tokens are yet to be drawn, from the logits; None if they are drawn."""
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
        """Of the batch's rows; valid until the next launch, and changed by the rules of rows that the device has drawn."""
        return self._logits[: self._num_rows]

    def rows(self) -> torch.Tensor:
        """A copy of the batch's hidden rows; to be taken before the next launch."""
        return self._hidden[: self._num_rows].clone()

    def token_ids(self) -> list[int]:
        """The token of each row that was drawn on the device. Raises EngineFailure if a row has none."""
        self.wait()
        values = self._on_host[: self._num_rows].numpy()
        if not np.isfinite(values.view(np.float32)[:, 1]).all():
            raise EngineFailure("the model's logits are not finite")
        token_ids: list[int] = values[:, 0].tolist()
        return token_ids


class _Lane:
    """Host memory of one step in flight."""

    def __init__(self, bucket: Bucket, pool: KVPool, scratch_block: int) -> None:
        on_gpu = pool.device.type == "cuda"
        self.inputs = PackedRows(bucket, pool.layout.block_tokens, scratch_block, pinned=on_gpu)
        self.outputs = torch.zeros(bucket.rows, 2, dtype=torch.int32, pin_memory=on_gpu)
        self.done = torch.cuda.Event() if on_gpu else None


class DecodeSteps:
    """One per engine, used by its thread. Programs are made by `prepare`, or when a bucket is first asked for."""

    def __init__(
        self,
        model: Model,
        pool: KVPool,
        attention: RowsAttention,
        buckets: Buckets,
        scratch_block: int,
        *,
        vocab_size: int,
        capture: bool,
        draws: RowDraws | None = None,
    ) -> None:
        """`scratch_block` belongs to no sequence: padding is written there. Without `draws` only greedy tokens are drawn by
        steps."""
        self.drawn_behind: Counter[OnHost] = Counter()
        """Steps whose tokens the runner had to draw, by the reason."""
        self._model = model
        self._pool = pool
        self._attention = attention
        self._buckets = buckets
        self._scratch_block = scratch_block
        self._vocab_size = vocab_size
        self._draws = draws
        self._programs: dict[Bucket, Program] = {}
        self._lanes: dict[Bucket, list[_Lane]] = {}
        self._record: Record = GraphRecorder() if capture else as_it_is
        most_rows, device = buckets.rows[-1], pool.device
        # Tokens and their logits as 32 bits side by side: one copy brings those of some rows to the host.
        self._both = torch.zeros(most_rows, 2, dtype=torch.int32, device=device)
        logits = torch.zeros(most_rows, vocab_size, dtype=torch.float32, device=device)
        self._outputs = StepOutputs(logits, self._both[:, 0], self._both.view(torch.float32)[:, 1])

    @torch.inference_mode()
    def prepare(self) -> None:
        """Makes every program. Raises RuntimeError, as torch does, or an error of Triton's, if one cannot be captured."""
        gc.collect()  # what is let go of during a capture would break it
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
        plan = self._plan(batch, lane)
        num_fresh = lane.inputs.fill(batch.slices)
        draws = plan if isinstance(plan, DrawPlan) and plan.filters is not None else None
        words = step_words(bucket) if draws is None else lane.inputs.fill_draws(draws.specs, draws.ruled, self._vocab_size)
        program.inputs[:words].copy_(lane.inputs.tensor[:words], non_blocking=True)
        if num_fresh:  # a sequence's first token in a block is written by this step: it is zeroed whole
            fresh_blocks = PackedViews(program.inputs, bucket).fresh_blocks[:num_fresh]
            self._pool.tensor.index_fill_(0, fresh_blocks.long(), 0)
        program.run()
        if draws is not None and draws.filters is not None:
            program.draw(draws.filters, edits=bool(draws.ruled))
        lane.outputs.copy_(self._both[: bucket.rows], non_blocking=True)
        if lane.done is not None:
            lane.done.record()
        obstacle = plan if isinstance(plan, OnHost) else None
        return PendingStep(len(batch.slices), self._outputs.logits, program.hidden, lane.outputs, lane.done, obstacle)

    def _plan(self, batch: ScheduledBatch, lane: _Lane) -> DrawPlan | OnHost:
        plan = plan_draws(batch.slices, self._vocab_size)
        if isinstance(plan, DrawPlan) and plan.filters is not None:
            if self._draws is None:
                plan = OnHost.KERNELS
            elif not lane.inputs.has_room_for(plan.ruled):
                plan = OnHost.EDITS
        if isinstance(plan, OnHost):
            self.drawn_behind[plan] += 1
        return plan

    def program(self, bucket: Bucket) -> Program:
        program = self._programs.get(bucket)
        if program is None:
            lanes = [_Lane(bucket, self._pool, self._scratch_block) for _ in range(IN_FLIGHT)]
            program = Program(
                bucket,
                self._model,
                self._pool,
                self._attention,
                self._draws,
                self._outputs,
                lanes[0].inputs.tensor,
                self._record,
            )
            self._programs[bucket], self._lanes[bucket] = program, lanes
        return program


def _is_plain(item: SequenceSlice) -> bool:
    return len(item.token_ids) == 1 and not item.num_drafts and item.prompt_logprobs is None and len(item.samples) <= 1
