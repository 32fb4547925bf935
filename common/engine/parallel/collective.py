"""Sums and rows by torch.distributed: NCCL between GPUs. Gloo does the same between CPUs, for tests.

    sum    every shard of a stage gets all partial sums (one all-gather) and adds them in the order of the shards, in fp32
    rows   from a stage to the next, same shard: one send, one receive

What is exchanged are bytes, and the order of addition is that of `sums`: not a bit depends on who carries them. NCCL's own sums
are not used, for their order is its own.

Ranks find each other by a file in a folder that only this user can enter, named by rank 0 over the socket that the rank was born
with; all links are on loopback or between the GPUs. Each link is used once before the group serves. A peer that is gone, or
silent for too long, is a RankLost; on GPUs NCCL's watchdog may end the process instead, which is the end of the group as well.

The groups are objects of their own: torch's default process group is left alone, and a process may be in several.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

from common.engine.parallel.share import Share
from common.engine.parallel.sums import Sum, add_in_order
from common.errors import EngineFailure, RankLost

if TYPE_CHECKING:
    from common.config import ParallelConfig

_LOOPBACK = "lo"
_distributed: Any = torch.distributed  # its stores and groups are documented, and have no types


class Exchange:
    """Some ranks of a group among whom bytes are exchanged. Every call is a collective of those it is about."""

    def __init__(self, name: str, rank: int, size: int) -> None:
        """`name` is that of the exchange, `rank` a place in it."""
        self.rank = rank
        self.size = size
        self._name = name
        self._group: Any = None

    def connect(self, backend: str, store: Any, timeout_s: float) -> None:
        try:
            own = _distributed.PrefixStore(self._name, store)
            self._group = _process_group(backend, self._name, own, self.rank, self.size, timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise RankLost(f"{self._name}: the ranks do not find each other: {_first_line(error)}") from error

    def all_gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """What each of them has, in order; of equal shapes."""
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        self._wait(self._connected.allgather([[_bytes(part) for part in parts]], [_bytes(mine)]))
        return parts

    def send(self, rows: torch.Tensor, to: int) -> None:
        self._wait(self._connected.send([_bytes(rows)], to, 0))

    def receive(self, rows: torch.Tensor, origin: int) -> None:
        self._wait(self._connected.recv([_bytes(rows)], origin, 0))

    def abort(self) -> None:
        if self._group is not None:
            self._group.abort()

    def close(self) -> None:
        if self._group is not None:
            self._group.shutdown()
            self._group = None

    @property
    def _connected(self) -> Any:
        if self._group is None:
            raise EngineFailure(f"{self._name} is not connected")
        return self._group

    def _wait(self, work: Any) -> None:
        """On a GPU only the queue waits."""
        try:
            work.wait()
        except RuntimeError as error:
            raise RankLost(f"{self._name}: another rank is gone, or said nothing in time: {_first_line(error)}") from error


class CollectiveSum:
    """A `Sum`."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def __call__(self, partial: torch.Tensor) -> torch.Tensor:
        return add_in_order(self._exchange.all_gather(partial.contiguous()), partial.dtype)


class CollectiveRows:
    """`Rows` between two: the first of them has the earlier stage."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def send(self, rows: torch.Tensor) -> None:
        self._exchange.send(rows.contiguous(), 1)

    def receive(self, rows: torch.Tensor) -> None:
        self._exchange.receive(rows, 0)


class CollectiveConnections:
    """Of one rank. Made without a word to the others; they meet in `connect`."""

    def __init__(
        self, share: Share, parallel: ParallelConfig, backend: str, rendezvous: str, timeout_s: float, device: torch.device
    ) -> None:
        """`rendezvous` is a file that is not there yet, in a private folder."""
        self._backend = backend
        self._rendezvous = rendezvous
        self._num_ranks = parallel.num_ranks
        self._timeout_s = timeout_s
        self._device = device
        stage, shard, shards = share.stage, share.shard, parallel.tensor_parallel
        self._among_shards = Exchange(f"shards of stage {stage}", shard, shards) if shards > 1 else None
        self._before = None if share.is_first else Exchange(f"rows of shard {shard} to stage {stage}", 1, 2)
        self._behind = None if share.is_last else Exchange(f"rows of shard {shard} to stage {stage + 1}", 0, 2)
        self.add_up: Sum | None = None if self._among_shards is None else CollectiveSum(self._among_shards)
        self.previous = None if self._before is None else CollectiveRows(self._before)
        self.following = None if self._behind is None else CollectiveRows(self._behind)

    def connect(self) -> None:
        store = _distributed.FileStore(self._rendezvous, self._num_ranks)
        store.set_timeout(timedelta(seconds=self._timeout_s))
        for exchange in self._exchanges:
            exchange.connect(self._backend, store, self._timeout_s)
        self._try_out()

    def abort(self) -> None:
        for exchange in self._exchanges:
            exchange.abort()

    def close(self) -> None:
        for exchange in self._exchanges:
            exchange.close()

    @property
    def _exchanges(self) -> Sequence[Exchange]:
        """From stage to stage in one order: nobody waits in a circle."""
        return [one for one in (self._among_shards, self._before, self._behind) if one is not None]

    def _try_out(self) -> None:
        """Links of GPUs are made when they are first used. Raises EngineFailure if one carries something else."""
        probe = torch.arange(64, dtype=torch.float32, device=self._device)
        expected = probe * (self._among_shards.size if self._among_shards is not None else 1)
        found = probe if self.add_up is None else self.add_up(probe)
        if self.previous is not None:
            arrived = torch.empty_like(found)
            self.previous.receive(arrived)
            found = torch.where(arrived == expected, found, torch.nan)
        if self.following is not None:
            self.following.send(found)
        if not torch.equal(found, expected):
            raise EngineFailure("what ranks send each other does not arrive as it was sent")


def _process_group(backend: str, name: str, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    if backend == "nccl":
        os.environ.setdefault("NCCL_SOCKET_IFNAME", _LOOPBACK)  # where the ranks of one host find each other
        options = _distributed.ProcessGroupNCCL.Options()
        options.is_high_priority_stream = False
        options.global_ranks_in_group = list(range(size))
        options.group_name = name
        options._timeout = timeout
        return _distributed.ProcessGroupNCCL(store, rank, size, options)
    if backend == "gloo":
        gloo = _distributed.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(interface=_LOOPBACK)]
        options._timeout = timeout
        return gloo(store, rank, size, options)
    raise EngineFailure(f"ranks do not exchange anything by {backend!r}")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
