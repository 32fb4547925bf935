"""Products compile for sm_90 without a GPU: tensor cores are used, nothing spills, everything fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.engine.triton_kernels.configurations import SHARED_BYTES

ROOT = Path(__file__).resolve().parents[4]
ON_TENSOR_CORES = {"w4a16_kernel", "w8a8_kernel", "fp8_kernel", "exact_kernel", "grouped_kernel"}
OTHERS = {"sum_partials_kernel", "round_rows_kernel"}


@pytest.mark.long
def test_products_compile_for_tensor_cores_without_spilling(request: pytest.FixtureRequest) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment["TRITON_CACHE_DIR"] = str(request.config.cache.mkdir("triton"))
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    command = [sys.executable, "-m", "support.compile_products"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {entry["name"] for entry in found} == ON_TENSOR_CORES | OTHERS
    for entry in found:
        assert entry["spilled_bytes"] == 0, entry
        assert entry["shared_bytes"] <= SHARED_BYTES, entry
        if entry["name"] in ON_TENSOR_CORES:
            assert entry["tensor_cores"], entry
            assert entry["async_copies"] > 0, entry
    assert {entry["name"] for entry in found if entry["tensor_cores"] == "wgmma"} == ON_TENSOR_CORES  # with enough rows
