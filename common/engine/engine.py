"""Builds an engine: everything a worker needs to compute, from a model path and a configuration.

    model files, configuration -> EnginePlan -> KV pool (over given memory) -> model -> runner
                                            \\-> block manager

    several ranks: the same, but that each rank has a share of the model, and a pool for it (`common.engine.parallel`)

On a GPU decode steps are captured at the end (`device_steps`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.blocks import root_hash
from common.engine.block_manager import BlockManager
from common.engine.block_matrix import Weight, in_full
from common.engine.cores import Cores, OwnCores
from common.engine.device_memory import DeviceAllocation
from common.engine.engine_plan import EnginePlan, dtype_of
from common.engine.exactness_check import check_exactness
from common.engine.kv_pool import FIRST_BLOCK, KVPool
from common.engine.loader import ModelArchitecture, load_stored_weights, load_weights
from common.engine.models import Model, create_model
from common.engine.pool_memory import PoolMemory, create_pool
from common.engine.quantisation import WeightFormat, rounded_weights
from common.engine.runner import ModelRunner, Successor
from common.engine.settings import EngineSettings
from common.engine.swap_region import SwapRegion, SwapSpace
from common.errors import ConfigError, PdserveError
from common.types import KVLayout

if TYPE_CHECKING:
    from common.config import ParallelConfig
    from common.engine.captured.steps import DecodeSteps
    from common.engine.parallel.group import RankGroup


@dataclass(frozen=True, slots=True)
class Engine:
    layout: KVLayout  # of whole blocks
    architecture: ModelArchitecture
    pool: KVPool  # of this process
    blocks: BlockManager
    runner: ModelRunner
    device: torch.device
    dtype: torch.dtype
    max_model_tokens: int  # longest prompt + output
    device_memory: DeviceAllocation | None  # the pool's, on a GPU
    group: RankGroup | None = None  # the processes that compute it, if this one has others

    @property
    def degree(self) -> tuple[int, int]:
        """Processes that divide a layer, and stages."""
        return (1, 1) if self.group is None else (self.group.parallel.tensor_parallel, self.group.parallel.pipeline_parallel)

    def is_for(self, config: EngineSettings, parallel: ParallelConfig) -> bool:
        """Whether a worker with this configuration, of the same model, would have an engine like this one."""
        return (
            self.degree == (parallel.tensor_parallel, parallel.pipeline_parallel)
            and self.layout.block_tokens == config.block_tokens
            and self.dtype == dtype_of(config, self.device)
        )

    def swap_space(self, num_bytes: int) -> SwapSpace:
        """As many slots as fit, and one does. The engine has one at a time. Blocking."""
        if self.group is None:
            return SwapRegion(self.pool, num_bytes)
        from common.engine.parallel.swaps import GroupSwapRegion

        return GroupSwapRegion(self.group.conductor, self.runner.settle, self.layout, self.pool.num_blocks, num_bytes)

    def close(self) -> None:
        """Ends the other processes, if there are any. Blocking; the runner must not be used afterwards."""
        if self.group is not None:
            self.group.close()


def build_engine(
    model_path: Path,
    config: EngineSettings,
    *,
    threads: int,
    model_digest: str,
    tokenizer_digest: str,
    memory: PoolMemory | None = None,
    announce: Callable[[str], None] = lambda _: None,
    parallel: ParallelConfig | None = None,
    name: str = "engine",
    cores: Cores | None = None,
) -> Engine:
    """Loads the model and builds all around it; blocking. Raises a StartupError.

    `memory` provides the KV pool's memory on a CPU; None lets the pool allocate. `announce` is told, once, what could not be had
    and is done without. `parallel` says how many processes compute; with several, `memory` is for the pool of this one, and
    `name` stands before what they log. `cores` says how many threads native kernels take, if not always `threads`.
    """
    torch.set_num_threads(threads)
    plan = EnginePlan.of(
        model_path,
        config,
        threads=threads,
        model_digest=model_digest,
        tokenizer_digest=tokenizer_digest,
        parallel=parallel,
        announce=announce,
    )
    cores = cores or OwnCores(threads)
    engine = _of_ranks(plan, memory, name) if plan.shares else _of_one_process(plan, memory, cores, announce)
    if config.exact:
        try:
            vocab_size = plan.architecture.vocab_size
            check_exactness(engine.runner, engine.pool, engine.blocks, vocab_size, plan.max_model_tokens)
        except PdserveError:
            engine.close()
            raise
    return engine


def _of_ranks(plan: EnginePlan, memory: PoolMemory | None, name: str) -> Engine:
    # Here, for an engine of one process needs nothing of them.
    from common.config import EngineConfig
    from common.engine.parallel.group import RankGroup
    from common.engine.parallel.model import ShareOrder

    config, parallel = plan.config, plan.parallel
    if not isinstance(config, EngineConfig) or parallel is None:
        raise ConfigError("workers of several ranks need a whole configuration", param="engine")
    order = ShareOrder(
        rank=0,
        model_path=str(plan.model_path),
        engine=config,
        weight_format=plan.weight_format,
        parallel=parallel,
        threads=plan.threads,
        layout=plan.layout,
        num_blocks=plan.num_blocks,
        max_model_tokens=plan.max_model_tokens,
        library="" if plan.library is None else str(plan.library.path),
        device=plan.device.type,
        kernels="triton" if plan.has_triton and plan.device.type == "cuda" else "torch",
        backend="nccl" if plan.device.type == "cuda" else "",
    )
    program = "" if memory is None else memory.rank_program
    group = RankGroup.start(order, plan.shares, memory, name=name, program=program)
    mine = group.mine
    runner = ModelRunner(mine.model, mine.pool, plan.numerics, len(mine.share.heads), group=group.conductor)
    return _around(plan, mine.pool, runner, device_memory=mine.device_memory, group=group)


def _of_one_process(plan: EnginePlan, memory: PoolMemory | None, cores: Cores, announce: Callable[[str], None]) -> Engine:
    weights = _weights(plan)
    # One block more than there are to hand out: where the padding of captured steps is written.
    pool_blocks = plan.num_blocks + 1 if plan.captures_steps else plan.num_blocks
    pool, device_memory = create_pool(plan.layout, pool_blocks, plan.device, memory)

    def create_torch_model() -> Model:
        tensors = {name: in_full(weights.pop(name), plan.dtype) for name in list(weights)}  # not to be held twice
        as_they_are = plan.weight_format in (WeightFormat.MODEL, plan.numerics.weight_format)
        given = tensors if as_they_are else rounded_weights(tensors, plan.weight_format)
        return create_model(plan.architecture, given, plan.numerics, plan.max_model_tokens)

    successor: Successor | None = None
    if plan.may_be_native:
        from common.config import pdserve_home
        from common.engine.native.choice import choose_model

        cache = pdserve_home() / "kernels"
        model, successor = choose_model(plan, weights, pool, cores=cores, cache=cache, create_torch_model=create_torch_model)
    else:
        model = create_torch_model()
    steps = _captured_steps(plan, model, pool, announce) if plan.captures_steps else None
    runner = ModelRunner(model, pool, plan.numerics, plan.architecture.num_heads, successor, steps=steps)
    return _around(plan, pool, runner, device_memory=device_memory)


def _weights(plan: EnginePlan) -> dict[str, Weight]:
    if plan.weight_format is WeightFormat.FILE and plan.may_be_native:
        _, stored = load_stored_weights(plan.model_path, plan.dtype)
        return stored
    _, tensors = load_weights(plan.model_path, plan.dtype, plan.device)
    return {name: tensors.pop(name).to(plan.device) for name in list(tensors)}


def _captured_steps(plan: EnginePlan, model: Model, pool: KVPool, announce: Callable[[str], None]) -> DecodeSteps | None:
    from common.engine.device_steps import capture_steps

    return capture_steps(
        model,
        pool,
        plan.numerics.operations,
        plan.architecture.num_heads,
        most_rows=plan.config.captured_rows,
        max_model_tokens=plan.max_model_tokens,
        scratch_block=plan.num_blocks,
        vocab_size=plan.architecture.vocab_size,
        announce=announce,
    )


def _around(
    plan: EnginePlan,
    pool: KVPool,
    runner: ModelRunner,
    *,
    device_memory: DeviceAllocation | None = None,
    group: RankGroup | None = None,
) -> Engine:
    fingerprint = plan.layout.fingerprint
    blocks = BlockManager(
        plan.num_blocks,
        plan.config.block_tokens,
        lambda salt: root_hash(fingerprint, salt),
        prefix_cache=plan.config.prefix_cache,
        first_block=FIRST_BLOCK,
    )
    return Engine(
        layout=plan.layout,
        architecture=plan.architecture,
        pool=pool,
        blocks=blocks,
        runner=runner,
        device=plan.device,
        dtype=plan.dtype,
        max_model_tokens=plan.max_model_tokens,
        device_memory=device_memory,
        group=group,
    )
