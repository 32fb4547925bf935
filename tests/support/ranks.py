"""All ranks of a group in one process, a thread each: the real shares, sockets and sums, without processes to start."""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import pytest
import torch

from common.blocks import num_blocks
from common.config import EngineConfig, ParallelConfig
from common.engine.batch import ScheduledBatch
from common.engine.kv_pool import FIRST_BLOCK
from common.engine.loader import load_architecture
from common.engine.models import LayerDone
from common.engine.parallel.links import Link, socket_pair
from common.engine.parallel.messages import CopyOrder, StepOrder, decode, encode_copy, encode_step
from common.engine.parallel.model import ShareLinks, ShareOrder, build_share
from common.engine.parallel.share import Share, shares_of
from common.engine.parallel.stage import StageShare
from common.errors import PdserveError
from common.types import ROUNDED, KVLayout
from kvtransfer.ranks.beside import serve

TIMEOUT_S = 60.0


class ThreadGroup:
    """Steps go to all shares at once; `memory` is the pool that they share."""

    def __init__(self, shares: list[StageShare], memory: bytearray, layout: KVLayout, pool: ThreadPoolExecutor) -> None:
        self.shares = shares
        self.memory = memory
        self.layout = layout
        self._pool = pool

    def all_logits(self, batch: ScheduledBatch, layer_done: LayerDone | None = None) -> torch.Tensor:
        hidden = compute_watched(self._pool, self.shares, batch, layer_done)
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
            _close(links)


def compute_watched(
    pool: ThreadPoolExecutor, shares: Sequence[StageShare], batch: ScheduledBatch, layer_done: LayerDone | None
) -> list[torch.Tensor | None]:
    """All shares at once; the layers are told of in their order, by the first shard of each stage, while it computes."""
    done: dict[int, queue.Queue[int]] = {one.share.rank: queue.Queue() for one in shares if one.share.shard == 0}

    def compute(one: StageShare) -> torch.Tensor | None:
        told = done.get(one.share.rank) if layer_done is not None else None
        return one.compute(batch, None if told is None else told.put)

    computing = [pool.submit(compute, one) for one in shares]
    if layer_done is not None:
        for one in (one for one in shares if one.share.shard == 0):
            for layer in one.share.layers:
                assert done[one.share.rank].get(timeout=TIMEOUT_S) == layer + 1 - one.share.layers.start
                layer_done(layer + 1)
    return [future.result() for future in computing]


class ThreadRanks:
    """In the place of a `RankGroup`: what reaches the other ranks has gone through the same messages, but they are threads."""

    pids: tuple[int, ...] = ()

    def __init__(self, order: ShareOrder, shares: Sequence[Share], memory: memoryview, memory_fd: int) -> None:
        self.parallel = order.parallel
        self.beside: list[socket.socket] = []
        self._besides = [self._start_beside(order, memory, os.dup(memory_fd)) for _ in shares[1:]]
        self._links = _connect(shares)
        self._shares = [build_share(order.for_rank(rank), memory, self._links[rank]) for rank in range(len(shares))]
        self._pool = ThreadPoolExecutor(len(shares), thread_name_prefix="rank")

    @classmethod
    def start(
        cls, order: ShareOrder, shares: Sequence[Share], memory: memoryview, memory_fd: int, *, name: str, program: str
    ) -> ThreadRanks:
        return cls(order, shares, memory, memory_fd)

    def _start_beside(self, order: ShareOrder, memory: memoryview, descriptor: int) -> threading.Thread:
        mine, theirs = socket.socketpair()
        self.beside.append(mine)
        arguments = theirs, memory, descriptor, order.layout.block_bytes, order.num_blocks
        thread = threading.Thread(target=serve, args=arguments, name="beside a rank")
        thread.start()
        return thread

    @property
    def mine(self) -> StageShare:
        return self._shares[0]

    def watch(self, on_lost: Callable[[PdserveError], None]) -> None:
        """Threads are not lost."""

    def compute(
        self,
        batch: ScheduledBatch,
        wanted: Sequence[Sequence[int]],
        kept: Sequence[int] = (),
        layer_done: LayerDone | None = None,
    ) -> Iterator[torch.Tensor]:
        step = decode(encode_step(batch, wanted, kept, watched=layer_done is not None))
        assert isinstance(step, StepOrder)
        hidden = compute_watched(self._pool, self._shares, step.batch, layer_done)
        ends = [(share, rows) for share, rows in zip(self._shares, hidden, strict=True) if rows is not None]
        logits = (torch.cat([share.logits(one, rows) for share, one in ends], dim=1) for rows in step.wanted)
        first, rows = ends[0]
        return chain(logits, (first.rows(rows, step.kept),)) if step.kept else logits

    def copy_block(self, source: int, destination: int) -> None:
        order = decode(encode_copy(source, destination))
        assert isinstance(order, CopyOrder)
        for share in self._shares:
            share.copy_block(order.source, order.destination)

    def close(self) -> None:
        for end in self.beside:
            end.close()
        for thread in self._besides:
            thread.join()
        self._pool.shutdown()
        _close(self._links)


@contextmanager
def ranks_as_threads() -> Iterator[None]:
    """Workers that are started meanwhile have their ranks in this process: a second of computing less for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.engine.parallel.group.RankGroup", ThreadRanks)
        yield


def _close(links: Sequence[ShareLinks]) -> None:
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
