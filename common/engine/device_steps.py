"""What a GPU engine has beyond a CPU's: a pool sized by what its share of the device leaves, and captured decode steps.

    shape of the model, share -> MemoryPlan -> number of KV blocks        before the weights are read
    model, pool -> DecodeSteps, or None and the reason said once           after

If CUDA cannot capture a step the engine computes as it would without: slower, and right.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from common.blocks import num_blocks
from common.engine.attention import RowsAttention, create_rows_attention
from common.engine.captured.buckets import make_buckets
from common.engine.captured.memory_plan import MemoryPlan, StepShape, plan_memory
from common.engine.captured.steps import DecodeSteps
from common.engine.kv_pool import FIRST_BLOCK, KVPool
from common.engine.loader import ModelArchitecture
from common.engine.models import Model
from common.engine.operations import Operations
from common.engine.quantisation import WeightFormat, is_rounded
from common.engine.triton_kernels.choice import launch_failures
from common.types import KVLayout

PROMPT_ROWS = 2048  # of a step, as far as memory is reserved for them
_BITS = {WeightFormat.INT8: 8.5, WeightFormat.INT4: 4.25, WeightFormat.FP8: 8.0}  # of a weight, its share of a scale included


def plan_device(
    architecture: ModelArchitecture,
    layout: KVLayout,
    weight_format: WeightFormat,
    *,
    share: float,
    total_bytes: int,
    free_bytes: int,
    captured_rows: int,
) -> MemoryPlan:
    """Raises ConfigError if the share is too small."""
    experts = architecture.experts_per_token or 1
    shape = StepShape(
        most_rows=max(PROMPT_ROWS, captured_rows),
        logit_rows=max(captured_rows, 64),
        hidden_size=architecture.hidden_size,
        widest=max(
            2 * architecture.ffn_size * experts, (architecture.num_heads + 2 * architecture.num_kv_heads) * layout.head_dim
        ),
        vocab_size=architecture.vocab_size,
        element_bytes=layout.dtype_bytes,
    )
    return plan_memory(
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        share=share,
        weights_bytes=weights_bytes(architecture, layout.dtype_bytes, weight_format),
        steps_bytes=shape.bytes,
        block_bytes=layout.block_bytes,
        fewest_blocks=FIRST_BLOCK + 2,
    )


def weights_bytes(architecture: ModelArchitecture, element_bytes: int, weight_format: WeightFormat) -> int:
    bits = 0.0
    for name, shape in architecture.tensor_shapes().items():
        size = 1
        for length in shape:
            size *= length
        rounded = len(shape) == 2 and is_rounded(name) and ".experts." not in name
        bits += size * (_BITS.get(weight_format, 8 * element_bytes) if rounded else 8 * element_bytes)
    return int(bits / 8)


def capture_steps(
    model: Model,
    pool: KVPool,
    operations: Operations,
    num_heads: int,
    *,
    most_rows: int,
    max_model_tokens: int,
    scratch_block: int,
    vocab_size: int,
    announce: Callable[[str], None],
) -> DecodeSteps | None:
    rows_attention: RowsAttention = create_rows_attention(operations.attention, pool, num_heads)
    buckets = make_buckets(
        most_rows, num_blocks(max_model_tokens, pool.layout.block_tokens), one_width=not rows_attention.reads_whole_tables
    )
    try:
        steps = DecodeSteps(
            model,
            pool,
            rows_attention,
            buckets,
            scratch_block,
            vocab_size=vocab_size,
            capture=True,
            draws=operations.row_draws,
        )
        steps.prepare()
    except launch_failures() as error:
        announce(f"decode steps cannot be captured and are computed one operation at a time: {error}")
        torch.cuda.synchronize()
        return None
    return steps
