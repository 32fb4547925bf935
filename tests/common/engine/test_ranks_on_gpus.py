"""What only two GPUs can show: ranks with a GPU each compute what one engine does, swap, hand over, and end together."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from common.config import DecodeConfig, EngineConfig, ParallelConfig, PrefillConfig
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.engine import Engine, build_engine
from common.errors import RankLost
from support.greedy_steps import generate
from support.tiny_models import make_tiny_model
from support.workers import request, running_workers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.long,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
]
LENGTHS = (16, 3, 90)
DEGREES = [(2, 1), (1, 2)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), seed=3, layers=3, heads=6, kv_heads=3)


@contextmanager
def built(path: Path, degree: tuple[int, int], **changes: object) -> Iterator[Engine]:
    config = EngineConfig(**{"device": "cuda", "dtype": "float32", "kv_pool_tokens": 2048, "max_model_tokens": 512, **changes})
    parallel = ParallelConfig(tensor_parallel=degree[0], pipeline_parallel=degree[1], micro_batch_tokens=8)
    engine = build_engine(path, config, threads=1, model_digest="m", tokenizer_digest="t", parallel=parallel)
    try:
        yield engine
    finally:
        engine.close()


@pytest.mark.parametrize("degree", DEGREES, ids=str)
@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_tokens_are_those_of_the_cpu(tiny: Path, degree: tuple[int, int], kernels: str) -> None:
    with built(tiny, (1, 1), device="cpu", kernels="torch") as alone:
        expected = generate(alone.runner, 30, LENGTHS)
    with built(tiny, degree, kernels=kernels) as engine:
        assert engine.group is not None
        assert engine.pool.device.type == "cuda"
        assert generate(engine.runner, 30, LENGTHS) == expected


@pytest.mark.parametrize("degree", DEGREES, ids=str)
def test_exact_mode_holds(tiny: Path, degree: tuple[int, int]) -> None:
    """An engine that starts in exact mode has shown it on rank 0's KV; here its logits in chunks."""
    with built(tiny, degree, exact=True) as engine:
        token_ids = [(7 * place) % 300 for place in range(100)]
        whole = engine.runner.compute_all_logits(ScheduledBatch((SequenceSlice(token_ids, 0, list(range(1, 8))),)))
        parts = [
            engine.runner.compute_all_logits(
                ScheduledBatch((SequenceSlice(token_ids[start : start + 33], start, list(range(10, 17))),))
            )
            for start in range(0, 100, 33)
        ]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("degree", DEGREES, ids=str)
def test_blocks_go_to_the_host_and_come_back_on_every_rank(tiny: Path, degree: tuple[int, int]) -> None:
    """The same prompt goes on from other blocks than it was computed in."""
    with built(tiny, degree) as engine:
        space = engine.swap_space(8 * engine.layout.block_bytes)
        prompt = [(7 * place) % 300 for place in range(32)]
        engine.runner.compute_logits(ScheduledBatch((SequenceSlice(prompt, 0, [1, 2]),)))
        step = [7]
        expected = engine.runner.compute_logits(ScheduledBatch((SequenceSlice(step, 32, [1, 2, 3]),)))
        space.move([], [(1, 0), (2, 1)])
        engine.runner.compute_logits(ScheduledBatch((SequenceSlice(prompt[::-1], 0, [1, 2]),)))
        space.move([(0, 11), (1, 12)], [])
        assert torch.equal(engine.runner.compute_logits(ScheduledBatch((SequenceSlice(step, 32, [11, 12, 13]),))), expected)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_rank_ends_the_group(tiny: Path, number: signal.Signals) -> None:
    with built(tiny, (2, 1), rank_timeout_s=4.0) as engine:
        assert engine.group is not None
        generate(engine.runner, 3, LENGTHS)
        os.kill(engine.group.pids[0], number)
        with pytest.raises(RankLost):
            generate(engine.runner, 10_000, LENGTHS)


@pytest.mark.parametrize("degree", DEGREES, ids=str)
async def test_ranks_on_the_same_gpus_hand_over_to_each_other(tiny: Path, degree: tuple[int, int]) -> None:
    """Rank n of both workers is on GPU n, and what they share goes by cuda_ipc."""
    tensor, pipeline = degree
    config = EngineConfig(device="cuda", dtype="float32", kv_pool_tokens=2048, prefix_cache=False, rank_timeout_s=60.0)
    async with running_workers(
        tiny,
        engine=config,
        decode=DecodeConfig(tensor_parallel=tensor, pipeline_parallel=pipeline, local_prefill="never"),
        prefill=PrefillConfig(tensor_parallel=tensor, pipeline_parallel=pipeline),
        transports=("cuda_ipc",),
    ) as workers:
        answers = await asyncio.gather(
            *(workers.generate(request([3 + place % 40 for place in range(length)], max_tokens=12)) for length in (5, 40, 150))
        )
        assert all(answer.started and answer.started.timings.transport == "cuda_ipc" for answer in answers)
        await workers.assert_nothing_leaks()
    with built(tiny, (1, 1), device="cpu", kernels="torch") as alone:
        for length, answer in zip((5, 40, 150), answers, strict=True):
            known = [3 + place % 40 for place in range(length)]
            for token_id in answer.token_ids[0]:
                logits = alone.runner.compute_logits(ScheduledBatch((SequenceSlice(known, 0, list(range(1, 12))),)))
                assert int(logits.argmax()) == token_id
                known.append(token_id)
