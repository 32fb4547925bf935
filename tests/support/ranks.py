"""All ranks of a group in one process, a thread each: the real shares, sockets and sums, without processes to start."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

from common.blocks import num_blocks
from common.config import EngineConfig, ParallelConfig
from common.engine.batch import ScheduledBatch
from common.engine.kv_pool import FIRST_BLOCK
from common.engine.loader import load_architecture
from common.engine.models import LayerDone
from common.engine.parallel.conductor import Conductor
from common.engine.parallel.links import Link, socket_pair
from common.engine.parallel.messages import encode_stop
from common.engine.parallel.model import ShareLinks, ShareOrder, build_share
from common.engine.parallel.rank_process import serve
from common.engine.parallel.share import Share, shares_of
from common.engine.parallel.stage import StageShare
from common.engine.pool_memory import BlockMemory
from common.engine.weights_choice import choose_weights
from common.errors import PdserveError, RankLost
from common.types import ROUNDED, KVLayout
from kvtransfer.ranks.beside import Beside

TIMEOUT_S = 60.0


class ThreadGroup:
    """Steps go to all shares at once."""

    def __init__(self, shares: list[StageShare], layout: KVLayout, pool: ThreadPoolExecutor) -> None:
        self.shares = shares
        self.layout = layout
        self._pool = pool

    def all_logits(self, batch: ScheduledBatch, layer_done: LayerDone | None = None) -> torch.Tensor:
        hidden = compute_watched(self._pool, self.shares, batch, layer_done)
        rows = range(batch.num_tokens)
        parts = [share.logits(one, rows) for share, one in zip(self.shares, hidden, strict=True) if one is not None]
        return torch.cat(parts, dim=1)

    @property
    def kv(self) -> torch.Tensor:
        """Whole blocks, put together from the ranks' pools."""
        first = self.shares[0].pool.tensor
        layout = self.layout
        whole = first.new_zeros((first.shape[0], layout.num_layers, layout.num_kv_heads, *first.shape[3:]))
        for one in self.shares:
            layers, heads = one.share.layers, one.share.kv_heads
            whole[:, layers.start : layers.stop, heads.start : heads.stop] = one.pool.tensor
        return whole


@contextmanager
def thread_group(
    path: Path,
    parallel: ParallelConfig,
    config: EngineConfig,
    *,
    library: str = "",
    max_model_tokens: int = 512,
    backend: str = "",
) -> Iterator[ThreadGroup]:
    """`backend` of torch.distributed; "" = sockets."""
    whole = load_architecture(path)
    shares = shares_of(whole, parallel)
    dtype = ROUNDED + config.dtype if config.kv_dtype == "int8" else config.dtype
    layout = KVLayout("", "", whole.num_layers, whole.num_kv_heads, whole.head_dim, config.block_tokens, dtype, config.exact)
    total_blocks = FIRST_BLOCK + num_blocks(config.kv_pool_tokens, config.block_tokens)
    order = ShareOrder(
        rank=0,
        model_path=str(path),
        engine=config,
        weight_format=choose_weights(config, path, whole, "cpu"),
        parallel=parallel,
        threads=1,
        layout=layout,
        num_blocks=total_blocks,
        max_model_tokens=max_model_tokens,
        library=library,
        backend=backend,
        rendezvous=f"{mkdtemp()}/rendezvous" if backend else "",
    )
    links = _connect(shares)
    built = [build_share(order.for_rank(rank), None, links[rank]) for rank in range(len(shares))]
    with ThreadPoolExecutor(len(shares)) as pool:
        try:
            for future in [pool.submit(one.connect) for one in built]:
                future.result(TIMEOUT_S)
            yield ThreadGroup(built, layout, pool)
        finally:
            for one in built:
                one.abort()
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
    """In the place of a `RankGroup`: orders and what comes back are the real ones, but the other ranks are threads."""

    pids: tuple[int, ...] = ()

    def __init__(self, order: ShareOrder, shares: Sequence[Share], memory: BlockMemory | None) -> None:
        self.parallel = order.parallel
        self.beside: list[socket.socket] = []
        self._links = _connect(shares)
        besides = [Beside(touch=False) for _ in shares[1:]]
        memories = [memory, *(beside.memory for beside in besides)]
        self.shares = [build_share(order.for_rank(rank), memories[rank], self._links[rank]) for rank in range(len(shares))]
        self._threads = [self._start_beside(beside, share) for beside, share in zip(besides, self.shares[1:], strict=True)]
        self._controls: dict[int, Link] = {}
        for share in self.shares[1:]:
            self._controls[share.share.rank], theirs = _pair(self.shares[0].share, share.share)
            self._start(partial(self._serve, theirs, share), "rank")
        self.conductor = Conductor(order.parallel, self.mine, self._controls, shares, self._end)

    @classmethod
    def start(
        cls, order: ShareOrder, shares: Sequence[Share], memory: BlockMemory | None, *, name: str, program: str
    ) -> ThreadRanks:
        return cls(order, shares, memory)

    def _start(self, work: Callable[[], None], name: str) -> threading.Thread:
        thread = threading.Thread(target=work, name=name)
        thread.start()
        self._threads.append(thread)
        return thread

    def _start_beside(self, beside: Beside, share: StageShare) -> threading.Thread:
        mine, theirs = socket.socketpair()
        self.beside.append(mine)
        arguments = theirs, share.device_memory, share.pool.layout.block_bytes
        thread = threading.Thread(target=beside.serve, args=arguments, name="beside a rank")
        thread.start()
        return thread

    def _serve(self, control: Link, share: StageShare) -> None:
        try:
            serve(control, share)
        except RankLost:
            return  # the others have ended
        finally:
            control.shut_down()
            control.close()

    def _end(self, error: PdserveError) -> None:
        for link in (*self._controls.values(), *_all(self._links)):
            link.shut_down()

    @property
    def mine(self) -> StageShare:
        return self.shares[0]

    def watch(self, on_lost: Callable[[PdserveError], None]) -> None:
        """Threads are not lost."""

    def close(self) -> None:
        for control in self._controls.values():
            with suppress(RankLost):
                control.send(encode_stop())
        for end in self.beside:
            end.close()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
        for control in self._controls.values():
            control.close()
        _close(self._links)


@contextmanager
def ranks_as_threads() -> Iterator[None]:
    """Workers that are started meanwhile have their ranks in this process: a second of computing less for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.engine.parallel.group.RankGroup", ThreadRanks)
        yield


def _all(links: Sequence[ShareLinks]) -> list[Link]:
    found = [(*one.shards.values(), *(end for end in (one.previous, one.following) if end is not None)) for one in links]
    return list(chain.from_iterable(found))


def _close(links: Sequence[ShareLinks]) -> None:
    for link in _all(links):
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
