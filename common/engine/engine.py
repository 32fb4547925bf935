"""Builds an engine: everything a worker needs to compute, from a model path and a configuration.

    model files -> architecture -> layout and sizes -> KV pool (over given memory) -> model -> runner
                                                    \\-> block manager

    several ranks: the same, but that each rank has a share of the model over one pool (`common.engine.parallel`)

The order matters: sizes are decided, and refused, before the weights are read. On a GPU the pool may take what weights and steps
leave of a stated share, and decode steps are captured at the end (`device_steps`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from common.blocks import num_blocks, root_hash
from common.engine.block_manager import BlockManager
from common.engine.block_matrix import Weight, in_full
from common.engine.cores import Cores, OwnCores
from common.engine.device_memory import DeviceAllocation
from common.engine.exact import ExactNumerics
from common.engine.exactness_check import check_exactness
from common.engine.kv_pool import FIRST_BLOCK, KVPool
from common.engine.loader import ModelArchitecture, load_architecture, load_stored_weights, load_weights
from common.engine.models import Model, create_model
from common.engine.numerics import FastNumerics, Numerics
from common.engine.operations import Operations
from common.engine.quantisation import WeightFormat, rounded_weights
from common.engine.runner import ModelRunner, Successor
from common.engine.settings import EngineSettings
from common.engine.triton_kernels.choice import choose_operations
from common.errors import ConfigError, PdserveError, StartupError
from common.types import ROUNDED, KVLayout

if TYPE_CHECKING:
    from common.config import ParallelConfig
    from common.engine.native.library import Library
    from common.engine.parallel.group import RankGroup
    from common.engine.parallel.share import Share


class PoolMemory(Protocol):
    """Where a KV pool's memory comes from (a shared region, on CPUs)."""

    def allocate(self, block_bytes: int, num_blocks: int) -> memoryview:
        """Called once."""
        ...

    @property
    def descriptor(self) -> int | None:
        """Of that memory, for other processes to map; None if it has none."""
        ...


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
            and self.dtype == _dtype(config, self.device)
        )

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
    and is done without. `parallel` says how many processes compute; with several, memory with a descriptor is needed, and `name`
    stands before what they log. `cores` says how many threads native kernels take, if not always `threads`.
    """
    torch.set_num_threads(threads)
    device = _device(config)
    dtype = _dtype(config, device)
    weight_format = WeightFormat.of(config.weights, device.type, config.kernels)
    architecture = load_architecture(model_path)
    _check_few_bits(config, device, model_path)
    shares = _shares_of_ranks(architecture, parallel)
    library = _settled_library(config, architecture, device, dtype, shares)
    layout = KVLayout(
        model_digest=_digest_as_computed(model_digest, weight_format, _bits(config, parallel, library)),
        tokenizer_digest=tokenizer_digest,
        num_layers=architecture.num_layers,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        block_tokens=config.block_tokens,
        dtype=(ROUNDED if config.kv_dtype == "int8" else "") + str(dtype).removeprefix("torch."),
        exact=config.exact,
    )
    operations = choose_operations(config, architecture, layout, device, announce)
    numerics = _numerics(config, operations, weight_format)
    usable_blocks = _usable_blocks(config, architecture, layout, weight_format, device)
    total_blocks = FIRST_BLOCK + usable_blocks
    max_model_tokens = min(
        config.max_model_tokens or architecture.context_tokens,
        architecture.context_tokens,
        usable_blocks * config.block_tokens,
    )
    fingerprint = layout.fingerprint
    blocks = BlockManager(
        total_blocks,
        config.block_tokens,
        lambda salt: root_hash(fingerprint, salt),
        prefix_cache=config.prefix_cache,
        first_block=FIRST_BLOCK,
    )
    if parallel is not None and shares:
        group = _start_group(
            model_path, config, parallel, shares, library, layout, total_blocks, max_model_tokens, threads, device, memory, name
        )
        pool = group.mine.pool
        runner = ModelRunner(group.mine.model, pool, numerics, len(group.mine.share.heads), group=group)
        if numerics.exact:
            try:
                check_exactness(runner, pool, blocks, architecture.vocab_size, max_model_tokens)
            except PdserveError:
                group.close()
                raise
        return Engine(layout, architecture, pool, blocks, runner, device, dtype, max_model_tokens, None, group)
    captures = device.type == "cuda" and config.captured_rows > 0 and not config.exact
    native = config.kernels == "native" or (config.kernels == "auto" and device.type == "cpu")
    weights: dict[str, Weight]
    if weight_format is WeightFormat.FILE:
        native = library is not None
    if weight_format is WeightFormat.FILE and native:
        _, weights = load_stored_weights(model_path, dtype)
    else:
        _, tensors = load_weights(model_path, dtype, device)
        weights = {name: tensor.to(device) for name, tensor in tensors.items()}
        del tensors
    # One block more than there are to hand out: where the padding of captured steps is written.
    pool_blocks = total_blocks + 1 if captures else total_blocks
    device_memory = None
    if device.type == "cuda":
        device_memory = DeviceAllocation(layout.block_bytes * pool_blocks, device)
        pool = KVPool(layout, pool_blocks, device, device_memory.words)
    else:
        given_memory = None if memory is None else memory.allocate(layout.block_bytes, pool_blocks)
        pool = KVPool(layout, pool_blocks, device, given_memory)

    def create_torch_model() -> Model:
        tensors = {name: in_full(weights.pop(name), dtype) for name in list(weights)}  # not to be held twice
        as_they_are = weight_format in (WeightFormat.MODEL, numerics.weight_format)
        given = tensors if as_they_are else rounded_weights(tensors, weight_format)
        return create_model(architecture, given, numerics, max_model_tokens)

    successor: Successor | None = None
    if native:
        from common.config import pdserve_home
        from common.engine.native.choice import choose_model

        model, successor = choose_model(
            config,
            architecture,
            weights,
            dtype,
            pool,
            max_model_tokens,
            cores=cores or OwnCores(threads),
            cache=pdserve_home() / "kernels",
            create_torch_model=create_torch_model,
            settled=library,
        )
    else:
        model = create_torch_model()
    steps = None
    if captures:
        from common.engine.device_steps import capture_steps

        steps = capture_steps(
            model,
            pool,
            numerics.operations.attention,
            architecture.num_heads,
            most_rows=config.captured_rows,
            max_model_tokens=max_model_tokens,
            scratch_block=total_blocks,
            announce=announce,
        )
    runner = ModelRunner(model, pool, numerics, architecture.num_heads, successor, steps=steps)
    if numerics.exact:
        check_exactness(runner, pool, blocks, architecture.vocab_size, max_model_tokens)
    return Engine(layout, architecture, pool, blocks, runner, device, dtype, max_model_tokens, device_memory)


def _shares_of_ranks(architecture: ModelArchitecture, parallel: ParallelConfig | None) -> tuple[Share, ...]:
    """What each of several processes has of the model; nothing if there is one process."""
    if parallel is None or parallel.num_ranks == 1:
        return ()
    # Here, for an engine of one process needs nothing of it.
    from common.engine.parallel.share import shares_of

    return shares_of(architecture, parallel)


def _settled_library(
    config: EngineSettings,
    architecture: ModelArchitecture,
    device: torch.device,
    dtype: torch.dtype,
    shares: tuple[Share, ...],
) -> Library | None:
    """The native kernels, where it has to be settled before the start who computes: bits of torch and of kernels do not mix, and
    of weights as a file holds them torch would need a copy in full."""
    settles = config.exact or bool(shares) or config.weights == "file"
    if config.kernels not in ("auto", "native") or device.type != "cpu" or not settles:
        return None
    from common.config import pdserve_home
    from common.engine.native.choice import choose_library
    from common.engine.native.library import Library

    whole_groups = all(share.has_whole_groups(architecture.head_dim) for share in shares)
    path = choose_library(config, architecture, device.type, dtype, pdserve_home() / "kernels", whole_groups=whole_groups)
    return Library(Path(path)) if path else None


def _start_group(
    model_path: Path,
    config: EngineSettings,
    parallel: ParallelConfig,
    shares: tuple[Share, ...],
    library: Library | None,
    layout: KVLayout,
    num_blocks: int,
    max_model_tokens: int,
    threads: int,
    device: torch.device,
    memory: PoolMemory | None,
    name: str,
) -> RankGroup:
    # Here, for an engine of one process needs nothing of them.
    from common.config import EngineConfig
    from common.engine.parallel.group import RankGroup
    from common.engine.parallel.model import ShareOrder

    if device.type != "cpu":
        raise ConfigError(f"workers of several ranks compute on CPUs, not on {device.type}", param="engine.device")
    if not isinstance(config, EngineConfig):
        raise ConfigError("workers of several ranks need a whole configuration", param="engine")
    order = ShareOrder(
        rank=0,
        model_path=str(model_path),
        engine=config,
        parallel=parallel,
        threads=threads,
        layout=layout,
        num_blocks=num_blocks,
        max_model_tokens=max_model_tokens,
        library="" if library is None else str(library.path),
    )
    region = None if memory is None else memory.allocate(layout.block_bytes, num_blocks)
    descriptor = None if memory is None else memory.descriptor
    if region is None or descriptor is None:
        raise StartupError("the ranks of a worker share its KV pool: it needs memory with a descriptor")
    return RankGroup.start(order, shares, region, descriptor, name=name)


def _bits(config: EngineSettings, parallel: ParallelConfig | None, library: Library | None) -> list[str]:
    """In exact mode, what changes a bit though not a weight: over how many parts sums run, and whose arithmetic it is."""
    if not config.exact:
        return []
    shards = 1 if parallel is None else parallel.tensor_parallel
    return ([f"{shards} shards"] if shards > 1 else []) + ([] if library is None else [library.arithmetic])


def _check_few_bits(config: EngineSettings, device: torch.device, model_path: Path) -> None:
    """Raises ConfigError for what cannot be had together."""
    on_cpu = device.type == "cpu" and config.kernels != "triton"
    if config.kv_dtype == "int8" and not on_cpu:
        raise ConfigError("keys and values in int8 are for CPUs, without Triton's kernels", param="engine.kv_dtype")
    if config.weights == "file" and not on_cpu:
        raise ConfigError("weights as the file holds them are for CPUs, without Triton's kernels", param="engine.weights")
    if config.weights == "file" and not model_path.is_file():
        raise ConfigError("weights as the file holds them need a GGUF file", param="engine.weights")


def _digest_as_computed(model_digest: str, weight_format: WeightFormat, bits: list[str]) -> str:
    """Rounded weights are other weights: their KV must not be mixed with that of the model as it came. Nor, in exact mode, KV
    with other bits."""
    if weight_format is WeightFormat.MODEL and not bits:
        return model_digest
    return hashlib.sha256(":".join([model_digest, weight_format, *bits]).encode()).hexdigest()


def _numerics(config: EngineSettings, operations: Operations | None, weight_format: WeightFormat) -> Numerics:
    """Where Triton's kernels compute all else, they multiply with rounded weights as well, and with those of experts."""
    if config.exact:
        return ExactNumerics(config.exact_tile_rows, operations)
    if operations is not None:
        from common.engine.gpu_numerics import GpuNumerics

        return GpuNumerics(weight_format, operations)
    return FastNumerics(operations)


def _usable_blocks(
    config: EngineSettings,
    architecture: ModelArchitecture,
    layout: KVLayout,
    weight_format: WeightFormat,
    device: torch.device,
) -> int:
    if device.type != "cuda" or config.device_memory_share is None:
        return num_blocks(config.kv_pool_tokens, config.block_tokens)
    from common.engine.device_steps import plan_device

    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    plan = plan_device(
        architecture,
        layout,
        weight_format,
        share=config.device_memory_share,
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        captured_rows=config.captured_rows,
    )
    return plan.num_blocks - FIRST_BLOCK - 1  # and the block for padding


def _device(config: EngineSettings) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device here", param="engine.device")
    return torch.device(config.device)


def _dtype(config: EngineSettings, device: torch.device) -> torch.dtype:
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
