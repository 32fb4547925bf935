"""`benchmarks.gpu` at toy size on the CPU, where nothing but what a bare machine has can be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LACKING = (
    "fastapi",
    "gguf",
    "google",
    "grpc_health",
    "grpc_reflection",
    "llguidance",
    "nixl_cu13",
    "orjson",
    "pydantic",
    "ray",
    "redis",
    "rich",
    "structlog",
    "typer",
    "uvicorn",
)
"""What the path of these benchmarks must not need: it is not on a machine that has torch and little else."""
USED = {"numpy", "prometheus_client", "tokenizers", "torch", "xxhash"}
"""What it does need, beside Triton on a GPU."""
WATCH = f"""
import importlib.abc, os, sys

class Lacking(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {LACKING!r}:
            raise ModuleNotFoundError(f"a bare machine lacks {{name}}", name=name)
        return None

sys.meta_path.insert(0, Lacking())
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Also for processes that a benchmark starts: each imports `sitecustomize` first."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(WATCH)
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("block", "checks"),
    [
        pytest.param("kernels", {"K1", "K2", "K3", "K4", "K5", "K6"}, marks=pytest.mark.long),
        pytest.param("engine", {"E1", "E2", "E4", "Q1", "Q2", "X1"}, marks=pytest.mark.long),
        pytest.param("grid", {"M1"}, marks=pytest.mark.long),
        pytest.param("transfer", {"T1", "T3"}, marks=pytest.mark.long),
        pytest.param("disagg", {"D1", "D3"}, marks=pytest.mark.long),
    ],
)
def test_a_block_runs_on_a_bare_machine(block: str, checks: set[str], environment: dict[str, str], tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.gpu", block, "--device", "cpu", "--json", str(result)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    report = json.loads(result.read_text())
    assert {figure["check"] for figure in report["figures"]} == checks
    assert all(figure["value"] >= 0 for figure in report["figures"])
    assert all(figure["met"] is None for figure in report["figures"])  # a CPU's figures are held against nothing
    if block == "engine":
        assert [figure["fraction"] for figure in report["figures"] if figure["check"] in ("Q1", "Q2")] == [1.0, 1.0]
    if block == "disagg":
        ways = {"apart (turns)", "apart (streams)", "two whole engines"}
        assert {figure["what"].partition(":")[0] for figure in report["figures"] if figure["unit"] == "ms"} >= ways
    if block == "grid":
        assert {"batch", "context", "chunk", "tokens", "pairs", "seconds"} == report["grid"][0].keys()


@pytest.mark.long
def test_what_is_imported_is_what_the_documentation_names(environment: dict[str, str]) -> None:
    script = """
import sys
before = set(sys.modules)
import benchmarks.gpu, benchmarks.on_gpu.engine, benchmarks.on_gpu.kernels, benchmarks.on_gpu.transfer
import benchmarks.on_gpu.carried_model, benchmarks.on_gpu.disaggregation, benchmarks.on_gpu.sharing
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    assert imported >= USED
    assert not imported & {*LACKING, "grpc", "yaml", "httpx", "triton", "deploy", "router"}
