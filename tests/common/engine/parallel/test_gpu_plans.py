"""What ranks on GPUs would be, and what is refused by name, without a GPU: CUDA is asked for no more than is said here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import EngineConfig, ParallelConfig
from common.engine.engine import build_engine
from common.engine.engine_plan import EnginePlan
from common.engine.kv_pool import FIRST_BLOCK
from common.engine.parallel.group import RankGroup
from common.engine.parallel.model import ShareOrder
from common.errors import ConfigError, StartupError
from support.tiny_models import make_tiny_model

GIB = 1024**3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers on two stages, three KV heads on two shards."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), seed=3, layers=3, heads=6, kv_heads=3)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    def have(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * GIB, 8 * GIB))

    return have


def config(**changes: object) -> EngineConfig:
    return EngineConfig(**{"device": "cuda", "dtype": "float32", "kernels": "torch", "kv_pool_tokens": 512, **changes})


def plan(path: Path, parallel: ParallelConfig, said: list[str], **changes: object) -> EnginePlan:
    return EnginePlan.of(
        path,
        config(**changes),
        threads=1,
        model_digest="m",
        tokenizer_digest="t",
        parallel=parallel,
        announce=said.append,
    )


@pytest.mark.parametrize(
    ("tensor", "pipeline", "param"), [(2, 1, "tensor_parallel"), (2, 2, "tensor_parallel"), (1, 2, "pipeline_parallel")]
)
def test_too_few_gpus_are_refused_by_name(tiny: Path, gpus: Any, tensor: int, pipeline: int, param: str) -> None:
    parallel = ParallelConfig(tensor_parallel=tensor, pipeline_parallel=pipeline)
    gpus(tensor * pipeline - 1)
    with pytest.raises(ConfigError, match=f"{tensor * pipeline} ranks need a GPU each") as caught:
        plan(tiny, parallel, [])
    assert caught.value.param == param
    gpus(tensor * pipeline)
    assert len(plan(tiny, parallel, []).shares) == tensor * pipeline


def test_rounded_weights_are_for_one_rank(tiny: Path, gpus: Any) -> None:
    gpus(2)
    with pytest.raises(ConfigError, match="int8 is for one rank") as caught:
        plan(tiny, ParallelConfig(tensor_parallel=2), [], weights="int8")
    assert caught.value.param == "engine.weights"


def test_steps_of_ranks_are_not_captured_and_it_is_said_once(tiny: Path, gpus: Any) -> None:
    gpus(2)
    said: list[str] = []
    assert not plan(tiny, ParallelConfig(tensor_parallel=2), said).captures_steps
    assert len([text for text in said if "not captured" in text]) == 1
    assert plan(tiny, ParallelConfig(), said).captures_steps


def test_there_are_as_many_blocks_as_the_fullest_rank_has_room_for(tiny: Path, gpus: Any) -> None:
    """Two of three layers, two of three heads: a block takes at least as much there as on any other rank."""
    gpus(4)
    alone = plan(tiny, ParallelConfig(), [], device_memory_share=0.5)
    divided = plan(tiny, ParallelConfig(tensor_parallel=2, pipeline_parallel=2), [], device_memory_share=0.5)
    biggest = max(share.layout(divided.layout).block_bytes for share in divided.shares)
    assert biggest * 9 == divided.layout.block_bytes * 4
    assert divided.layout == alone.layout
    taken = (divided.num_blocks - FIRST_BLOCK) * biggest
    assert 0.4 * 8 * GIB < taken < 0.5 * 8 * GIB
    assert divided.num_blocks > 2 * alone.num_blocks


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_ranks_on_gpus_exchange_by_nccl(tiny: Path, gpus: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2)
    orders: list[ShareOrder] = []

    def start(order: ShareOrder, *arguments: object, **options: object) -> RankGroup:
        orders.append(order)
        raise StartupError("far enough")

    monkeypatch.setattr(RankGroup, "start", start)
    with pytest.raises(StartupError, match="far enough"):
        build_engine(
            tiny,
            config(device=device),
            threads=1,
            model_digest="m",
            tokenizer_digest="t",
            parallel=ParallelConfig(tensor_parallel=2),
        )
    (order,) = orders
    assert (order.device, order.backend, order.kernels, order.library) == ("cuda", "nccl", "torch", "")
    assert ShareOrder.decode(order.encode()) == order
