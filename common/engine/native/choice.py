"""Which model serves, and when: torch's until the native library is compiled, then the native one.

    kernels: torch, triton                               torch
    auto, and a GPU, float16, another family             torch
    exact mode, several processes, a large file          decided before anything is computed (`choose_library`)
    library is in the cache                              native from the start
    else                                                 torch, and a Successor that compiles beside it

auto falls back to torch with one warning if there is no library to be had; native refuses to start instead. A fresh library has
to agree with torch's arithmetic on a small model before it serves (`check`). Where bits have to agree nothing is switched later:
the library is compiled first, exact mode refuses to start if it cannot be had, and who computes is part of what workers compare
before they exchange KV.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.engine.block_matrix import Weight
from common.engine.cores import Cores
from common.engine.kv_pool import KVPool
from common.engine.loader import ModelArchitecture
from common.engine.models import Model
from common.engine.native.build import build_library, find_library
from common.engine.native.check import check_library
from common.engine.native.library import Library
from common.engine.native.model import MAX_HEAD_DIM, NativeModel
from common.engine.native.panels import ModelPanels
from common.engine.quantisation import WeightFormat
from common.engine.settings import EngineSettings
from common.errors import ConfigError, EngineFailure
from common.logs import get_logger

if TYPE_CHECKING:
    from common.engine.engine_plan import EnginePlan

_log = get_logger(__name__)


def choose_model(
    plan: EnginePlan,
    weights: Mapping[str, Weight],
    pool: KVPool,
    *,
    cores: Cores,
    cache: Path,
    create_torch_model: Callable[[], Model],
) -> tuple[Model, Successor | None]:
    """The model to start with, and perhaps one that will take over. In exact mode it is what `choose_library` found
    (`plan.library`) or torch's for good. Raises ConfigError."""
    config, settled = plan.config, plan.library
    if settled is None and (
        config.exact or not _wants_native(config, plan.architecture, plan.device.type, plan.dtype, plan.weight_format)
    ):
        return create_torch_model(), None
    library = settled if settled is not None else _library_at_hand(config, cache)
    panels = ModelPanels.of(plan.architecture, weights, plan.weight_format, plan.dtype)

    def create(library: Library) -> Model:
        return NativeModel(library, plan.architecture, panels, pool, plan.max_model_tokens, cores)

    if library is not None:
        _log.info("native kernels compute")
        return create(library), None
    return create_torch_model(), Successor(cache, create)


def choose_library(
    config: EngineSettings,
    architecture: ModelArchitecture,
    device: str,
    dtype: torch.dtype,
    weight_format: WeightFormat,
    cache: Path,
    *,
    whole_groups: bool = True,
) -> str:
    """For those who must compute the same way from the start to the end, which are several processes, and one in exact mode or
    with a file in blocks that is dear in full: the path of the library, compiled now if need be, or "" for torch. `whole_groups`:
    no process has a part of a group of rounded weights. Raises ConfigError."""
    if not _wants_native(config, architecture, device, dtype, weight_format):
        return ""
    if weight_format is not WeightFormat.MODEL and not whole_groups:
        if config.kernels == "native":
            raise ConfigError("no native kernels for parts of groups of rounded weights", param="engine.kernels")
        _log.info("torch computes: ranks would divide groups of rounded weights")
        return ""
    try:
        return str(build_library(cache, check_library))
    except EngineFailure as error:
        if config.kernels == "native":
            raise ConfigError(f"no native kernels: {error}", param="engine.kernels") from error
        if config.exact:
            # Another worker may have them. A request that moves between the two would change bits under way.
            raise ConfigError(
                f"exact mode computes by native kernels, and there are none: {error}; kernels: torch is exact without them",
                param="engine.kernels",
            ) from error
        _log.warning("native kernels cannot be had; torch serves", reason=str(error))
        return ""


class Successor:
    """A library that is being compiled, and the model that takes over with it. `poll` belongs to the engine's thread."""

    def __init__(self, cache: Path, create: Callable[[Library], Model]) -> None:
        self._cache = cache
        self._create: Callable[[Library], Model] | None = create
        self._library: Library | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._build, name="kernel-build", daemon=True).start()

    def poll(self) -> Model | None:
        """The model, once; None as long as it is not ready, and for ever if it will never be."""
        if self._create is None or not self._ended.is_set():
            return None
        create, self._create = self._create, None  # whatever becomes of it, the packed weights are not kept here
        return None if self._library is None else create(self._library)

    def wait(self, timeout_s: float) -> bool:
        """Whether building ended, well or badly, within the time."""
        return self._ended.wait(timeout_s)

    def _build(self) -> None:
        try:
            self._library = _build(self._cache)
            _log.info("native kernels are ready and take over from torch")
        except EngineFailure as error:
            _log.warning("native kernels cannot be had; torch goes on serving", reason=str(error))
        finally:
            self._ended.set()


def _build(cache: Path) -> Library:
    """Compiles, checks and loads; seconds. Raises EngineFailure."""
    return Library(build_library(cache, check_library))


def _library_at_hand(config: EngineSettings, cache: Path) -> Library | None:
    """The library if no compiler has to run for it; with `kernels: native` it is compiled now. Raises ConfigError."""
    if config.kernels == "native":
        try:
            return _build(cache)
        except EngineFailure as error:
            raise ConfigError(f"no native kernels: {error}", param="engine.kernels") from error
    path = find_library(cache)
    if path is None:
        return None
    try:
        return Library(path)
    except EngineFailure as error:
        _log.warning("a library in the cache is unfit and is built again", path=str(path), reason=str(error))
        path.unlink(missing_ok=True)
        return None


def knows(architecture: ModelArchitecture) -> bool:
    """Whether native kernels are for models like this one."""
    return _obstacle_in(architecture) is None


def _wants_native(
    config: EngineSettings, architecture: ModelArchitecture, device: str, dtype: torch.dtype, weight_format: WeightFormat
) -> bool:
    """Raises ConfigError if native kernels are demanded where there are none."""
    if config.kernels in ("torch", "triton"):
        return False
    obstacle = _obstacle(architecture, device, dtype, weight_format)
    if obstacle is not None and config.kernels == "native":
        raise ConfigError(f"no native kernels {obstacle}", param="engine.kernels")
    if obstacle is not None:
        _log.info("torch computes: there are no native kernels", where=obstacle)
    return obstacle is None


def _obstacle(architecture: ModelArchitecture, device: str, dtype: torch.dtype, weight_format: WeightFormat) -> str | None:
    if device != "cpu":
        return f"on {device}"
    if weight_format is WeightFormat.FP8:
        return f"for weights in {weight_format}"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"for {str(dtype).removeprefix('torch.')}"
    return _obstacle_in(architecture)


def _obstacle_in(architecture: ModelArchitecture) -> str | None:
    if architecture.family != "llama":
        return f"for the family {architecture.family}"
    if architecture.head_dim > MAX_HEAD_DIM:
        return f"for heads of more than {MAX_HEAD_DIM} dimensions"
    return None
