"""Whether Triton's kernels compute what is not a matrix product. Imports Triton only where they might.

    kernels: torch, native     no
    kernels: auto              on CUDA, if they are there and right; else torch, with one warning
    kernels: triton            yes, on CUDA or in the interpreter (TRITON_INTERPRET=1, for tests), or the engine does not start

What is chosen has been held against torch on this device (`check`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from common.engine.loader import ModelArchitecture
from common.engine.operations import Operations
from common.engine.settings import EngineSettings
from common.errors import ConfigError, EngineFailure
from common.types import KVLayout

_MAX_HEAD_DIM = 256


def choose_operations(
    config: EngineSettings,
    architecture: ModelArchitecture,
    layout: KVLayout,
    device: torch.device,
    announce: Callable[[str], None],
) -> Operations | None:
    """None: those of torch. `announce` is told why, if they might have been others. Raises ConfigError if `engine.kernels`
    demands what cannot be had."""
    demanded = config.kernels == "triton"
    if not demanded and not (config.kernels == "auto" and device.type == "cuda"):
        return None
    obstacle = _obstacle(layout, device)
    if obstacle is None:
        try:
            return _checked(architecture, layout, device, exact=config.exact)
        except EngineFailure as error:
            obstacle = str(error)
    if demanded:
        raise ConfigError(f"no Triton kernels: {obstacle}", param="engine.kernels")
    announce(f"torch computes, for Triton's kernels cannot be had: {obstacle}")
    return None


def _obstacle(layout: KVLayout, device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from common.engine.triton_kernels.launch import interpreted

    if device.type != "cuda" and not interpreted():
        return "they need a GPU, or TRITON_INTERPRET=1"
    if interpreted() and layout.dtype == "bfloat16":
        return "the interpreter is wrong in bfloat16"
    if layout.head_dim > _MAX_HEAD_DIM or layout.head_dim % 2:
        return f"not for heads of {layout.head_dim} dimensions"
    return None


def launch_failures() -> tuple[type[Exception], ...]:
    """What launching and capturing may raise: torch's errors, whatever CUDA said, and those of Triton, where it is."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    from triton.errors import TritonError

    return (RuntimeError, TritonError)


def _checked(architecture: ModelArchitecture, layout: KVLayout, device: torch.device, *, exact: bool) -> Operations:
    """Raises EngineFailure if they do not compile, do not run, or are wrong."""
    from common.engine.triton_kernels.check import check_kernels
    from common.engine.triton_kernels.operations import TritonOperations

    try:
        check_kernels(architecture, layout, device, exact=exact)
    except launch_failures() as error:  # a driver that is missing or too old is a RuntimeError
        raise EngineFailure(f"{type(error).__name__}: {error}") from error
    return TritonOperations(exact=exact)
