"""Sums and rows by torch.distributed: to the bit what sockets give, and never waited for in vain.

Through Gloo, between threads; NCCL takes the same way and needs GPUs (`tests/common/engine/test_ranks_on_gpus.py`). The oracle of
a sum is plain addition, that of a model the same shares over sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.config import EngineConfig, ParallelConfig
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.loader import ModelArchitecture
from common.engine.parallel.collective import CollectiveConnections
from common.engine.parallel.share import shares_of
from common.errors import EngineFailure, RankLost
from support.ranks import thread_group
from support.tiny_models import make_tiny_model

CPU = torch.device("cpu")
MODEL = ModelArchitecture("llama", 4, 24, 6, 3, 4, 200, 300, 10_000.0, None, 1e-5, 128, True, False)
TOKENS = torch.randint(3, 380, (60,), generator=torch.Generator().manual_seed(5)).tolist()


@contextmanager
def connected(
    folder: Path, tensor: int, pipeline: int, timeout_s: float = 20.0
) -> Iterator[tuple[list[CollectiveConnections], ThreadPoolExecutor]]:
    parallel = ParallelConfig(tensor_parallel=tensor, pipeline_parallel=pipeline)
    ranks = [
        CollectiveConnections(share, parallel, "gloo", str(folder / "rendezvous"), timeout_s, CPU)
        for share in shares_of(MODEL, parallel)
    ]
    with ThreadPoolExecutor(len(ranks)) as pool:
        on_all(pool, [rank.connect for rank in ranks])
        try:
            yield ranks, pool
        finally:
            for rank in ranks:
                rank.abort()


def on_all(pool: ThreadPoolExecutor, calls: Sequence[Callable[[], object]]) -> list[object]:
    return [future.result(60) for future in [pool.submit(call) for call in calls]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7])
def test_sums_are_taken_in_the_order_of_shards_everywhere(tmp_path: Path, dtype: torch.dtype, rows: int) -> None:
    """Values for which another order gives another sum."""
    parts = [torch.full((rows, 5), value).to(dtype) for value in (1e8, -1e8, 1.0)]
    expected = ((parts[0].float() + parts[1].float()) + parts[2].float()).to(dtype)
    assert not torch.equal(((parts[1].float() + parts[2].float()) + parts[0].float()).to(dtype), expected)
    with connected(tmp_path, 3, 1) as (ranks, pool):
        sums = [rank.add_up for rank in ranks]
        found = on_all(pool, [lambda add_up=add_up, part=part: add_up(part) for add_up, part in zip(sums, parts, strict=True)])
        for one in found:
            assert isinstance(one, torch.Tensor)
            assert one.dtype == dtype
            assert torch.equal(one, expected)
    assert [part[0, 0].item() for part in parts] == [torch.tensor(value).to(dtype).item() for value in (1e8, -1e8, 1.0)]


def test_rows_go_from_stage_to_stage_in_order(tmp_path: Path) -> None:
    with connected(tmp_path, 2, 2) as (ranks, pool):
        sent = [[torch.randn(count, 24).bfloat16() for count in (3, 1)] for _ in range(2)]
        arrived = [[torch.empty_like(rows) for rows in of_shard] for of_shard in sent]

        def send(shard: int) -> None:
            for rows in sent[shard]:
                ranks[shard].following.send(rows)

        def receive(shard: int) -> None:
            for rows in arrived[shard]:
                ranks[2 + shard].previous.receive(rows)

        on_all(pool, [lambda: send(0), lambda: send(1), lambda: receive(0), lambda: receive(1)])
        for there, here in zip(arrived, sent, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(there, here, strict=True))
        assert [rank.previous is None for rank in ranks] == [True, True, False, False]
        assert [rank.following is None for rank in ranks] == [False, False, True, True]


def test_an_abort_reaches_every_group_of_the_rank(tmp_path: Path) -> None:
    """Gloo cannot abort; NCCL can. That a rank which dies wakes the others is seen in `tests/workers/test_ranks.py`."""
    parallel = ParallelConfig(tensor_parallel=2, pipeline_parallel=3)
    middle = CollectiveConnections(shares_of(MODEL, parallel)[2], parallel, "gloo", str(tmp_path / "rendezvous"), 1.0, CPU)
    middle.abort()  # also before it is connected
    aborted: list[str] = []
    for exchange in middle._exchanges:
        exchange._group = SimpleNamespace(abort=lambda name=exchange._name: aborted.append(name))
    middle.abort()
    assert aborted == ["shards of stage 1", "rows of shard 0 to stage 1", "rows of shard 0 to stage 2"]


def test_silence_has_an_end(tmp_path: Path) -> None:
    with connected(tmp_path, 2, 1, timeout_s=1.0) as (ranks, pool), pytest.raises(RankLost, match="shards of stage 0"):
        pool.submit(ranks[1].add_up, torch.ones(2, 3)).result(30)


def test_a_rank_that_does_not_come_is_not_waited_for_without_end(tmp_path: Path) -> None:
    parallel = ParallelConfig(tensor_parallel=2)
    first = CollectiveConnections(shares_of(MODEL, parallel)[0], parallel, "gloo", str(tmp_path / "rendezvous"), 1.0, CPU)
    with pytest.raises(RankLost, match="do not find each other"):
        first.connect()


def test_nothing_is_exchanged_before_all_are_there(tmp_path: Path) -> None:
    parallel = ParallelConfig(tensor_parallel=2)
    first = CollectiveConnections(shares_of(MODEL, parallel)[0], parallel, "gloo", str(tmp_path / "rendezvous"), 1.0, CPU)
    with pytest.raises(EngineFailure, match="not connected"):
        first.add_up(torch.ones(1))


@pytest.mark.parametrize(("tensor", "pipeline"), [(3, 1), (1, 3), (2, 2)])
def test_shares_compute_the_same_bits_as_over_sockets(tmp_path: Path, tensor: int, pipeline: int) -> None:
    path = make_tiny_model(tmp_path / "model", seed=4, layers=4, heads=6, kv_heads=3, ffn=200, attention_bias=True)
    parallel = ParallelConfig(tensor_parallel=tensor, pipeline_parallel=pipeline, micro_batch_tokens=8)
    batches = [
        ScheduledBatch((SequenceSlice(TOKENS[first:end], first, range(1, 5)), SequenceSlice(TOKENS[:3], 0, [7])))
        for first, end in ((0, 40), (40, 41), (41, 60))
    ]
    config = EngineConfig(device="cpu", dtype="float32", kernels="torch", kv_pool_tokens=256)
    found = []
    for backend in ("", "gloo"):
        with thread_group(path, parallel, config, backend=backend) as group:
            layers: list[int] = []
            logits = [group.all_logits(batch, layers.append) for batch in batches]
            assert layers == [1, 2, 3, 4] * 3
            found.append((torch.cat(logits), group.kv))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].abs().sum() > 0
