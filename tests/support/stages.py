"""Engines with stages, a thread for each rank, and what their stages say of the order in which they worked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from common.config import EngineConfig, ParallelConfig
from common.engine.batch import ScheduledBatch
from common.engine.engine import Engine, build_engine
from common.engine.models import LayerDone
from common.engine.parallel.stage import StageShare
from kvtransfer.region import PoolMemory
from support.ranks import ThreadRanks, ranks_as_threads

PATIENCE_S = 30.0
POOL_BLOCKS = 14


@contextmanager
def built(path: Path, tensor: int, pipeline: int, *, num_blocks: int = POOL_BLOCKS, **changes: object) -> Iterator[Engine]:
    values = {
        "device": "cpu",
        "dtype": "float32",
        "block_tokens": 4,
        "kv_pool_tokens": 4 * num_blocks,
        "prefix_cache": False,
        "exact": True,
        "kernels": "torch",
        "rank_timeout_s": 60.0,
    }
    with ranks_as_threads():
        engine = build_engine(
            path,
            EngineConfig(**(values | changes)),
            threads=1,
            model_digest="m",
            tokenizer_digest="t",
            memory=PoolMemory(touch=False) if tensor * pipeline > 1 else None,
            parallel=ParallelConfig(tensor_parallel=tensor, pipeline_parallel=pipeline, micro_batch_tokens=4),
        )
        try:
            yield engine
        finally:
            engine.runner.settle()
            engine.close()


@dataclass(frozen=True)
class Turn:
    stage: int
    starts: tuple[int, ...]  # positions of the part's rows: they tell steps and parts apart
    has_ended: bool


class Records:
    """Of all stages in one list; a stage may be held up until another has begun something."""

    def __init__(self, engine: Engine) -> None:
        self.turns: list[Turn] = []
        self.held: dict[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]]] = {}
        self._news = threading.Condition()
        group = engine.group
        assert isinstance(group, ThreadRanks)
        for share in group.shares:
            if share.share.shard == 0:
                self._watch(share)

    def _watch(self, share: StageShare) -> None:
        compute, stage = share.compute_part, share.share.stage

        def recorded(part: ScheduledBatch, layer_done: LayerDone | None = None) -> torch.Tensor | None:
            starts = tuple(item.start for item in part.slices)
            self._enter(Turn(stage, starts, has_ended=False))
            found = compute(part, layer_done)
            awaited = self.held.get((stage, starts))
            if awaited is not None:
                with self._news:
                    begun = self._news.wait_for(lambda: Turn(*awaited, has_ended=False) in self.turns, PATIENCE_S)
                    assert begun, f"stage {awaited[0]} has not begun {awaited[1]} while stage {stage} had {starts}"
            self._enter(Turn(stage, starts, has_ended=True))
            return found

        share.compute_part = recorded  # type: ignore[method-assign]

    def _enter(self, turn: Turn) -> None:
        with self._news:
            self.turns.append(turn)
            self._news.notify_all()

    def place(self, stage: int, starts: tuple[int, ...], *, ended: bool) -> int:
        return self.turns.index(Turn(stage, starts, has_ended=ended))
