"""All ranks of a group in one process, a thread each: the real shares, sockets and sums, without processes to start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from common.blocks import num_blocks
from common.config import EngineConfig, ParallelConfig
from common.engine.batch import ScheduledBatch
from common.engine.kv_pool import FIRST_BLOCK
from common.engine.loader import load_architecture
from common.engine.parallel.links import Link, socket_pair
from common.engine.parallel.model import ShareLinks, ShareOrder, build_share
from common.engine.parallel.share import Share, shares_of
from common.engine.parallel.stage import StageShare
from common.types import ROUNDED, KVLayout

TIMEOUT_S = 60.0


class ThreadGroup:
    """Steps go to all shares at once; `memory` is the pool that they share."""

    def __init__(self, shares: list[StageShare], memory: bytearray, layout: KVLayout, pool: ThreadPoolExecutor) -> None:
        self.shares = shares
        self.memory = memory
        self.layout = layout
        self._pool = pool

    def all_logits(self, batch: ScheduledBatch) -> torch.Tensor:
        hidden = list(self._pool.map(lambda share: share.compute(batch), self.shares))
        rows = range(batch.num_tokens)
        parts = [share.logits(one, rows) for share, one in zip(self.shares, hidden, strict=True) if one is not None]
        return torch.cat(parts, dim=1)

    @property
    def kv(self) -> torch.Tensor:
        layout = self.layout
        shape = (-1, layout.num_layers, layout.num_kv_heads, 2, layout.block_tokens, layout.row_bytes // layout.dtype_bytes)
        return torch.frombuffer(self.memory, dtype=torch.int8 if layout.is_rounded else getattr(torch, layout.dtype)).view(shape)


@contextmanager
def thread_group(
    path: Path, parallel: ParallelConfig, config: EngineConfig, *, library: str = "", max_model_tokens: int = 512
) -> Iterator[ThreadGroup]:
    whole = load_architecture(path)
    shares = shares_of(whole, parallel)
    dtype = ROUNDED + config.dtype if config.kv_dtype == "int8" else config.dtype
    layout = KVLayout("", "", whole.num_layers, whole.num_kv_heads, whole.head_dim, config.block_tokens, dtype, config.exact)
    total_blocks = FIRST_BLOCK + num_blocks(config.kv_pool_tokens, config.block_tokens)
    memory = bytearray(total_blocks * layout.block_bytes)
    order = ShareOrder(
        rank=0,
        model_path=str(path),
        engine=config,
        parallel=parallel,
        threads=1,
        layout=layout,
        num_blocks=total_blocks,
        max_model_tokens=max_model_tokens,
        library=library,
    )
    links = _connect(shares)
    built = [build_share(order.for_rank(rank), memoryview(memory), links[rank]) for rank in range(len(shares))]
    with ThreadPoolExecutor(len(shares)) as pool:
        try:
            yield ThreadGroup(built, memory, layout, pool)
        finally:
            for one in links:
                for link in (*one.shards.values(), *(end for end in (one.previous, one.following) if end is not None)):
                    link.close()


def _connect(shares: Sequence[Share]) -> list[ShareLinks]:
    within: list[dict[int, Link]] = [{} for _ in shares]
    previous: list[Link | None] = [None] * len(shares)
    following: list[Link | None] = [None] * len(shares)
    for one in shares:
        for other in shares:
            if one.rank < other.rank and one.stage == other.stage:
                within[one.rank][other.shard], within[other.rank][one.shard] = _pair(one, other)
            if other.stage == one.stage + 1 and other.shard == one.shard:
                following[one.rank], previous[other.rank] = _pair(one, other)
    return [ShareLinks(*ends) for ends in zip(within, previous, following, strict=True)]


def _pair(one: Share, other: Share) -> tuple[Link, Link]:
    left, right = socket_pair()
    return Link(left, f"rank {other.rank}", TIMEOUT_S), Link(right, f"rank {one.rank}", TIMEOUT_S)
