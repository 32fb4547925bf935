"""Builds an engine: everything a worker needs to compute, from a model path and a configuration.

    model files -> architecture -> layout and sizes -> KV pool (over given memory) -> model -> runner
                                                    \\-> block manager

The order matters: sizes are decided, and refused, before the weights are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from common.blocks import num_blocks, root_hash
from common.config import EngineConfig, pdserve_home
from common.engine.block_manager import BlockManager
from common.engine.exact import ExactNumerics
from common.engine.exactness_check import check_exactness
from common.engine.kv_pool import FIRST_BLOCK, KVPool
from common.engine.loader import ModelArchitecture, load_architecture, load_weights
from common.engine.models import create_model
from common.engine.native.choice import choose_model
from common.engine.numerics import FastNumerics, Numerics
from common.engine.quantisation import WeightFormat, rounded_weights
from common.engine.runner import ModelRunner
from common.engine.triton_kernels.choice import choose_operations
from common.errors import ConfigError
from common.types import KVLayout


@dataclass(frozen=True, slots=True)
class Engine:
    layout: KVLayout
    architecture: ModelArchitecture
    pool: KVPool
    blocks: BlockManager
    runner: ModelRunner
    device: torch.device
    dtype: torch.dtype
    max_model_tokens: int  # longest prompt + output


def build_engine(
    model_path: Path,
    config: EngineConfig,
    *,
    threads: int,
    model_digest: str,
    tokenizer_digest: str,
    memory: Callable[[int, int], memoryview] | None = None,
) -> Engine:
    """Loads the model and builds all around it; blocking. Raises a StartupError.

    `memory(block_bytes, num_blocks)` provides the KV pool's memory (a shared region, on CPUs); None lets the pool allocate.
    """
    torch.set_num_threads(threads)
    device = _device(config)
    dtype = _dtype(config, device)
    architecture = load_architecture(model_path)
    weight_format = WeightFormat(config.weights)
    layout = KVLayout(
        model_digest=_digest_as_computed(model_digest, weight_format),
        tokenizer_digest=tokenizer_digest,
        num_layers=architecture.num_layers,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        block_tokens=config.block_tokens,
        dtype=str(dtype).removeprefix("torch."),
        exact=config.exact,
    )
    operations = choose_operations(config, architecture, layout, device)
    numerics: Numerics = ExactNumerics(config.exact_tile_rows, operations) if config.exact else FastNumerics(operations)
    usable_blocks = num_blocks(config.kv_pool_tokens, config.block_tokens)
    total_blocks = FIRST_BLOCK + usable_blocks
    max_model_tokens = min(
        config.max_model_tokens or architecture.context_tokens,
        architecture.context_tokens,
        usable_blocks * config.block_tokens,
    )
    _, weights = load_weights(model_path, dtype)
    weights = {name: weight.to(device) for name, weight in weights.items()}
    pool = KVPool(layout, total_blocks, device, None if memory is None else memory(layout.block_bytes, total_blocks))
    fingerprint = layout.fingerprint
    blocks = BlockManager(
        total_blocks,
        config.block_tokens,
        lambda salt: root_hash(fingerprint, salt),
        prefix_cache=config.prefix_cache,
        first_block=FIRST_BLOCK,
    )
    in_torch = rounded_weights if weight_format is WeightFormat.INT8 else lambda as_they_are: as_they_are
    model, successor = choose_model(
        config,
        architecture,
        weights,
        pool,
        max_model_tokens,
        threads=threads,
        cache=pdserve_home() / "kernels",
        create_torch_model=lambda: create_model(architecture, in_torch(weights), numerics, max_model_tokens),
    )
    runner = ModelRunner(model, pool, numerics, architecture.num_heads, successor)
    if numerics.exact:
        check_exactness(runner, pool, blocks, architecture.vocab_size, max_model_tokens)
    return Engine(layout, architecture, pool, blocks, runner, device, dtype, max_model_tokens)


def _digest_as_computed(model_digest: str, weight_format: WeightFormat) -> str:
    """Rounded weights are other weights: their KV must not be mixed with that of the model as it came."""
    if weight_format is WeightFormat.MODEL:
        return model_digest
    return hashlib.sha256(f"{model_digest}:{weight_format}".encode()).hexdigest()


def _device(config: EngineConfig) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device here", param="engine.device")
    return torch.device(config.device)


def _dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        chosen: torch.dtype = getattr(torch, config.dtype)
        return chosen
    return torch.bfloat16 if device.type == "cuda" or _cpu_has_bfloat16() else torch.float32


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 natively; elsewhere it is emulated and slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
