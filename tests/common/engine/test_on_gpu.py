"""What only a GPU can show: captured steps say what others say, and blocks go from process to process on the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.config import EngineConfig
from common.engine.batch import SampleSpec, ScheduledBatch, SequenceSlice
from common.engine.engine import Engine, build_engine
from common.engine.runner import ModelRunner

pytestmark = [pytest.mark.gpu, pytest.mark.long]
ROOT = Path(__file__).resolve().parents[3]
GREEDY = SampleSpec(position=0, seed=0, choice=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=None)


def build(source: str, **changes: object) -> Engine:
    settings = {"device": "cuda", "dtype": "float32", "kv_pool_tokens": 2048, "max_model_tokens": 128, "captured_rows": 4}
    config = EngineConfig(**{**settings, **changes})
    return build_engine(Path(source), config, threads=1, model_digest="m", tokenizer_digest="t")


def generate(runner: ModelRunner, count: int) -> list[list[int]]:
    tokens = [[5 + place % 50 for place in range(length)] for length in (16, 3, 40)]
    blocks, in_kv = [list(range(1 + 8 * row, 9 + 8 * row)) for row in range(3)], [0, 0, 0]
    for _ in range(count):
        slices = [
            SequenceSlice(known[start:], start, table, (GREEDY,))
            for known, start, table in zip(tokens, in_kv, blocks, strict=True)
        ]
        result = runner.execute(ScheduledBatch(tuple(slices)))
        in_kv = [len(known) for known in tokens]
        for known, drawn in zip(tokens, result.slices, strict=True):
            known.append(drawn.tokens[0].token_id)
    return tokens


@pytest.mark.parametrize("weights", ["model", "int8", "int4", "fp8"])
@pytest.mark.parametrize("source", ["random:smollm2-135m", "random:toy-mixture"])
def test_captured_steps_say_what_others_say(source: str, weights: str) -> None:
    engine = build(source, weights=weights)
    assert engine.runner.steps is not None
    captured = generate(engine.runner, 40)
    assert captured == generate(engine.runner.without_steps(), 40)


def test_tokens_are_those_of_the_cpu() -> None:
    on_cpu = build("random:smollm2-135m", device="cpu", kernels="torch")
    assert generate(build("random:smollm2-135m").runner, 30) == generate(on_cpu.runner, 30)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_mode_holds_on_a_gpu(dtype: str) -> None:
    """An engine that starts in exact mode has shown it (`exactness_check`); here at more lengths."""
    engine = build("random:smollm2-135m", dtype=dtype, exact=True)
    token_ids = [(7 * place) % 400 for place in range(100)]
    whole = engine.runner.compute_all_logits(ScheduledBatch((SequenceSlice(token_ids, 0, list(range(1, 8))),)))
    for chunk in (1, 33):
        parts = [
            engine.runner.compute_all_logits(
                ScheduledBatch(
                    (
                        SequenceSlice(token_ids[start : start + chunk], start, list(range(10, 17))),
                        SequenceSlice([3] * (1 + start % 5), 0, [20]),
                    )
                )
            )[: min(chunk, 100 - start)]
            for start in range(0, 100, chunk)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_a_pool_takes_what_a_share_of_the_device_leaves() -> None:
    engine = build("random:smollm2-135m", dtype="bfloat16", device_memory_share=0.1)
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    pool_bytes = engine.pool.tensor.nbytes
    assert 0.03 * total_bytes < pool_bytes < 0.1 * total_bytes


@pytest.mark.parametrize("block", ["transfer"])
def test_blocks_go_from_process_to_process_on_the_device(block: str, tmp_path: Path) -> None:
    """The benchmark compares what arrived with what was sent, besides measuring."""
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.gpu", block, "--json", str(result)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=600, check=False)
    assert done.returncode == 0
    assert any("cuda_ipc" in figure["what"] for figure in json.loads(result.read_text())["figures"])
