from __future__ import annotations

import pytest

from common.engine.captured.memory_plan import StepShape, plan_memory
from common.engine.device_steps import plan_device, weights_bytes
from common.engine.loader.random_model import read_architecture
from common.engine.quantisation import WeightFormat
from common.errors import ConfigError
from common.types import KVLayout

GIB = 2**30


def test_the_pool_is_what_is_left() -> None:
    plan = plan_memory(
        total_bytes=100 * GIB,
        free_bytes=99 * GIB,
        share=0.5,
        weights_bytes=16 * GIB,
        steps_bytes=3 * GIB,
        block_bytes=GIB,
        fewest_blocks=1,
    )
    assert plan.reserve_bytes == GIB
    assert plan.num_blocks == 50 - 16 - 3 - 1
    assert plan.pool_bytes + plan.weights_bytes + plan.steps_bytes + plan.reserve_bytes <= 50 * GIB


def test_what_others_hold_is_left_to_them() -> None:
    sizes = {"total_bytes": 100 * GIB, "weights_bytes": 16 * GIB, "steps_bytes": 0, "block_bytes": GIB, "fewest_blocks": 1}
    alone = plan_memory(free_bytes=100 * GIB, share=0.9, **sizes)
    beside = plan_memory(free_bytes=40 * GIB, share=0.9, **sizes)
    assert alone.num_blocks == 72
    assert beside.num_blocks == 22


def test_a_share_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        plan_memory(total_bytes=100, free_bytes=100, share=0.2, weights_bytes=19, steps_bytes=0, block_bytes=1, fewest_blocks=3)
    assert refused.value.param == "engine.device_memory_share"


def test_models_of_known_size_are_counted_right() -> None:
    llama, qwen = read_architecture("random:llama-3-8b"), read_architecture("random:qwen3-30b-a3b")
    assert weights_bytes(llama, 2, WeightFormat.MODEL) == 2 * 8_030_261_248  # as the model's makers count
    assert weights_bytes(qwen, 2, WeightFormat.MODEL) == 2 * 30_532_122_624
    layers = 8_030_261_248 - 2 * 128_256 * 4096 - (2 * 32 + 1) * 4096
    assert weights_bytes(llama, 2, WeightFormat.INT4) == 2 * 8_030_261_248 - 2 * layers + layers * 17 // 32


def test_a_whole_plan_for_a_known_card() -> None:
    """Llama-3-8B on 141 GB: 16 GB of weights, and room for more than 800,000 tokens beside steps."""
    llama = read_architecture("random:llama-3-8b")
    layout = KVLayout("m", "t", 32, 8, 128, 16, "bfloat16", False)
    sizes = {"share": 0.9, "total_bytes": 143_771 * 2**20, "free_bytes": 143_000 * 2**20, "captured_rows": 256}
    plan = plan_device(llama, layout, WeightFormat.MODEL, **sizes)
    assert 800_000 < plan.num_blocks * 16 < 900_000
    assert plan.pool_bytes + plan.weights_bytes + plan.steps_bytes + plan.reserve_bytes <= 0.9 * sizes["total_bytes"]


def test_a_step_takes_what_its_rows_take() -> None:
    shape = StepShape(most_rows=10, logit_rows=2, hidden_size=8, widest=24, vocab_size=100, element_bytes=2)
    assert shape.bytes == 10 * (32 + 48) * 6 + 3 * 4 * 200
