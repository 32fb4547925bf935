"""Compiles kernels for a GPU that is not there, by calling what would launch them.

    with recorded_launches() as launches:      the arguments of every launch, instead of a launch
        add_norm(...)                          tensors may be on the CPU
    compile_launch(launches[0])                PTX and cubin for sm_90, registers and spilled bytes

For a process in which Triton was imported without TRITON_INTERPRET. It finds what the interpreter cannot: code that Triton
refuses, layouts that do not fit into shared memory, registers that are spilled. That a kernel is right or fast it does not say.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.uint32: "u32",
    torch.uint64: "u64",
    torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv",
}
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion", "maxnreg")


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction[Any]
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    name: str
    ptx: str
    shared_bytes: int
    registers: int
    spilled_bytes: int


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Within it no kernel runs: outputs are what memory happened to hold."""
    launches: list[Launch] = []

    def record(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool = False, **named: Any) -> None:
        options = {name: named.pop(name) for name in _OPTIONS if name in named}
        names = [parameter.name for parameter in kernel.params]
        arguments = dict(zip(names, args, strict=False)) | named
        for parameter in kernel.params:
            if parameter.name not in arguments:
                arguments[parameter.name] = parameter.default
        grid = grid(arguments) if callable(grid) else grid
        launches.append(Launch(kernel, tuple(int(size) for size in grid), arguments, options))

    before = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = before


def compile_launch(launch: Launch, target: GPUTarget = HOPPER) -> Compiled:
    """As Triton would for a first launch with these arguments."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], list[tuple[str, int]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        signature[parameter.name] = _type_of(value)
        aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if specialised and aligned and not isinstance(value, bool):
            hints[(index,)] = [("tt.divisibility", 16)]
    source = ASTSource(launch.kernel, signature, constants, hints)
    compiled = triton.compile(source, target=target, options=dict(launch.options))
    registers, spilled_bytes = _resources(compiled.asm["cubin"])
    return Compiled(launch.kernel.__name__, compiled.asm["ptx"], compiled.metadata.shared, registers, spilled_bytes)


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills or keeps on a stack, as the assembler that comes with Triton decided."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder:
        (Path(folder) / "kernel.cubin").write_bytes(cubin)
        command = [tool, "-res-usage", "kernel.cubin"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    usage = {name: max(map(int, re.findall(rf"{name}:(\d+)", done.stdout))) for name in ("REG", "STACK", "LOCAL")}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]
