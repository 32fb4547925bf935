"""Compiles the product kernels and those that move bytes for sm_90, at shapes of a large model; lines of JSON.

python -m support.compile_products        a process of its own, without Triton's interpreter
"""

from __future__ import annotations

import json

import torch

from common.engine.quantisation import quantise, quantise_fp8, quantise_int4
from common.engine.triton_kernels.gemm_exact import exact_linear
from common.engine.triton_kernels.gemm_fp8 import fp8
from common.engine.triton_kernels.gemm_w4a16 import w4a16
from common.engine.triton_kernels.gemm_w8a8 import w8a8
from common.engine.triton_kernels.grouped_gemm import GroupedPlan, grouped_product, tiling_for
from support.triton_compiler import Launch, compile_launch, recorded_launches


def main() -> None:
    weight = torch.randn(512, 1024)
    for num_rows in (1, 64):
        rows = torch.randn(num_rows, 1024, dtype=torch.bfloat16)
        with recorded_launches() as launches:
            w4a16(rows, *quantise_int4(weight), None)
            w8a8(rows, *quantise(weight), None)
            fp8(rows, *quantise_fp8(weight), None)
            exact_linear(rows, weight.bfloat16(), None)
        report(launches)
    experts = torch.randn(8, 512, 1024, dtype=torch.bfloat16)
    for num_slots in (16, 512, 4096):
        tiling = tiling_for(num_slots, 8)
        plan = GroupedPlan(torch.zeros(tiling.rows, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), tiling.rows)
        with recorded_launches() as launches:
            grouped_product(torch.randn(num_slots // 2, 1024, dtype=torch.bfloat16), experts, plan, num_slots, 2, tiling)
        report(launches)


def report(launches: list[Launch]) -> None:
    for launch in launches:
        compiled = compile_launch(launch)
        row = {
            "name": compiled.name,
            "registers": compiled.registers,
            "spilled_bytes": compiled.spilled_bytes,
            "shared_bytes": compiled.shared_bytes,
            "tensor_cores": "wgmma" if "wgmma" in compiled.ptx else "mma" if "mma.sync" in compiled.ptx else "",
            "async_copies": compiled.ptx.count("cp.async.c"),
        }
        print(json.dumps(row), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
