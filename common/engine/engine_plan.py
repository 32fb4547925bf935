"""What an engine will be: decided, and refused, before any weight is read.

    configuration, model's files -> device, dtype, format of weights -> shares of ranks, native kernels -> layout of KV -> sizes

A plan is a value; what is built from it is `common.engine.engine`'s. Nothing here holds memory of the pool or of weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.blocks import num_blocks
from common.engine.exact import ExactNumerics
from common.engine.kv_pool import FIRST_BLOCK
from common.engine.loader import ModelArchitecture, load_architecture
from common.engine.numerics import FastNumerics, Numerics
from common.engine.operations import Operations
from common.engine.quantisation import WeightFormat
from common.engine.settings import EngineSettings
from common.engine.triton_kernels.choice import choose_operations
from common.engine.weights_choice import choose_weights
from common.errors import ConfigError
from common.types import ROUNDED, KVLayout

if TYPE_CHECKING:
    from common.config import ParallelConfig
    from common.engine.native.library import Library
    from common.engine.parallel.share import Share

_CHEAP_COPY_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class EnginePlan:
    model_path: Path
    config: EngineSettings
    threads: int
    device: torch.device
    dtype: torch.dtype
    weight_format: WeightFormat
    architecture: ModelArchitecture
    parallel: ParallelConfig | None
    shares: tuple[Share, ...]  # of several processes; none if there is one
    library: Library | None  # native kernels, where it has to be settled before the start who computes
    layout: KVLayout
    numerics: Numerics
    has_triton: bool  # they compute what is not a matrix product
    num_blocks: int  # with those before FIRST_BLOCK
    max_model_tokens: int

    @classmethod
    def of(
        cls,
        model_path: Path,
        config: EngineSettings,
        *,
        threads: int,
        model_digest: str,
        tokenizer_digest: str,
        parallel: ParallelConfig | None,
        announce: Callable[[str], None],
    ) -> EnginePlan:
        """Blocking: it may compile kernels. Raises a StartupError."""
        device = _device(config)
        dtype = dtype_of(config, device)
        architecture = load_architecture(model_path)
        weight_format = choose_weights(config, model_path, architecture, device.type)
        _check_few_bits(config, device, model_path)
        shares = _shares_of_ranks(architecture, parallel)
        if shares and device.type == "cuda":
            _check_ranks_on_gpus(config, parallel, weight_format)
            announce("decode steps of several ranks are not captured: they are computed one operation at a time")
        library = _settled_library(config, architecture, device, dtype, weight_format, shares)
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
        usable_blocks = _usable_blocks(config, architecture, layout, weight_format, device, shares)
        return cls(
            model_path=model_path,
            config=config,
            threads=threads,
            device=device,
            dtype=dtype,
            weight_format=weight_format,
            architecture=architecture,
            parallel=parallel,
            shares=shares,
            library=library,
            layout=layout,
            numerics=numerics_of(config, operations, weight_format),
            has_triton=operations is not None,
            num_blocks=FIRST_BLOCK + usable_blocks,
            max_model_tokens=min(
                config.max_model_tokens or architecture.context_tokens,
                architecture.context_tokens,
                usable_blocks * config.block_tokens,
            ),
        )

    @property
    def captures_steps(self) -> bool:
        return self.device.type == "cuda" and self.config.captured_rows > 0 and not self.config.exact and not self.shares

    @property
    def may_be_native(self) -> bool:
        """Whether native kernels may compute: at once, or once they are compiled."""
        if self.library is None and _is_dear_in_full(self.architecture, self.dtype, self.weight_format):
            return False
        return self.config.kernels == "native" or (self.config.kernels == "auto" and self.device.type == "cpu")


def _shares_of_ranks(architecture: ModelArchitecture, parallel: ParallelConfig | None) -> tuple[Share, ...]:
    """What each of several processes has of the model; nothing if there is one process."""
    if parallel is None or parallel.num_ranks == 1:
        return ()
    # Here, for an engine of one process needs nothing of it.
    from common.engine.parallel.share import shares_of

    return shares_of(architecture, parallel)


def _check_ranks_on_gpus(config: EngineSettings, parallel: ParallelConfig | None, weight_format: WeightFormat) -> None:
    """Raises ConfigError unless each rank can have a GPU."""
    num_ranks, num_gpus = 1 if parallel is None else parallel.num_ranks, torch.cuda.device_count()
    if num_ranks > num_gpus:
        divided = parallel is not None and parallel.tensor_parallel > 1
        raise ConfigError(
            f"{num_ranks} ranks need a GPU each, and this worker has {num_gpus}",
            param="tensor_parallel" if divided else "pipeline_parallel",
        )
    if weight_format is not WeightFormat.MODEL:
        raise ConfigError(
            f"ranks on GPUs hold weights in the model's own type: {weight_format} is for one rank", param="engine.weights"
        )


def _settled_library(
    config: EngineSettings,
    architecture: ModelArchitecture,
    device: torch.device,
    dtype: torch.dtype,
    weight_format: WeightFormat,
    shares: tuple[Share, ...],
) -> Library | None:
    """The native kernels, where it has to be settled before the start who computes: bits of torch and of kernels do not mix, and
    of weights as a file holds them torch would need a copy in full, which may be dear."""
    settles = config.exact or bool(shares) or _is_dear_in_full(architecture, dtype, weight_format)
    if config.kernels not in ("auto", "native") or device.type != "cpu" or not settles:
        return None
    from common.config import pdserve_home
    from common.engine.native.choice import choose_library
    from common.engine.native.library import Library

    whole_groups = all(share.has_whole_groups(architecture.head_dim) for share in shares)
    cache = pdserve_home() / "kernels"
    path = choose_library(config, architecture, device.type, dtype, weight_format, cache, whole_groups=whole_groups)
    return Library(Path(path)) if path else None


def _is_dear_in_full(architecture: ModelArchitecture, dtype: torch.dtype, weight_format: WeightFormat) -> bool:
    """Whether torch should not hold the blocks of a file in full only until kernels are compiled."""
    values = sum(math.prod(shape) for shape in architecture.tensor_shapes().values())
    return weight_format is WeightFormat.FILE and values * dtype.itemsize > _CHEAP_COPY_BYTES


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


def numerics_of(config: EngineSettings, operations: Operations | None, weight_format: WeightFormat) -> Numerics:
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
    shares: tuple[Share, ...],
) -> int:
    """As many as every rank has room for: a block has the same number on all."""
    if device.type != "cuda" or config.device_memory_share is None:
        return num_blocks(config.kv_pool_tokens, config.block_tokens)
    from common.engine.device_steps import plan_device

    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    # The GPUs of ranks are taken for equal: to look at another one's memory would take some of it.
    held = [(one.architecture(architecture), one.layout(layout)) for one in shares] or [(architecture, layout)]
    plans = [
        plan_device(
            own_architecture,
            own_layout,
            weight_format,
            share=config.device_memory_share,
            total_bytes=total_bytes,
            free_bytes=free_bytes,
            captured_rows=config.captured_rows,
        )
        for own_architecture, own_layout in held
    ]
    return min(plan.num_blocks for plan in plans) - FIRST_BLOCK - 1  # and the block for padding


def _device(config: EngineSettings) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device here", param="engine.device")
    return torch.device(config.device)


def dtype_of(config: EngineSettings, device: torch.device) -> torch.dtype:
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
