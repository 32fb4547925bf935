"""What only a GPU can show: captured steps say what others say, and blocks go from process to process on the device."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.on_gpu.settings import Settings
from common.engine.batch import SampleSpec, ScheduledBatch, SequenceSlice
from common.engine.engine import Engine, build_engine
from common.engine.sampler import sample
from common.engine.swap_region import SwapRegion
from common.engine.token_rules import RowRules
from support.greedy_steps import GREEDY, generate

pytestmark = [pytest.mark.gpu, pytest.mark.long]
ROOT = Path(__file__).resolve().parents[3]
BANS = RowRules(banned_token_ids=np.arange(0, 49_152, 7))
LENGTHS = (16, 3, 40)


def build(source: str, **changes: object) -> Engine:
    settings = {"device": "cuda", "dtype": "float32", "kv_pool_tokens": 2048, "max_model_tokens": 128, "captured_rows": 4}
    config = Settings(**{**settings, **changes})
    return build_engine(Path(source), config, threads=1, model_digest="m", tokenizer_digest="t")


@pytest.mark.parametrize("weights", ["model", "int8", "int4", "fp8"])
@pytest.mark.parametrize("source", ["random:smollm2-135m", "random:toy-mixture"])
def test_captured_steps_say_what_others_say(source: str, weights: str) -> None:
    engine = build(source, weights=weights)
    assert engine.runner.steps is not None
    captured = generate(engine.runner, 40, LENGTHS)
    assert captured == generate(engine.runner.without_steps(), 40, LENGTHS)


def test_tokens_are_those_of_the_cpu() -> None:
    on_cpu = build("random:smollm2-135m", device="cpu", kernels="torch")
    assert generate(build("random:smollm2-135m").runner, 30, LENGTHS) == generate(on_cpu.runner, 30, LENGTHS)


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


DRAWS = (
    GREEDY,
    replace(GREEDY, temperature=0.8, top_p=0.9, seed=7),
    replace(GREEDY, temperature=1.2, top_k=40, min_p=0.01, seed=2**63 + 5),
)


@pytest.mark.parametrize("drawn", [DRAWS, DRAWS[1:2] * 3, (replace(DRAWS[1], rules=BANS), *DRAWS[1:])])
def test_captured_draws_are_those_of_the_host(drawn: tuple[SampleSpec, ...]) -> None:
    """From logits that are computed anew, without a graph: so far apart that a token changes they are not in fp32."""
    engine = build("random:smollm2-135m")
    steps = engine.runner.steps
    assert steps is not None
    tokens, blocks = [[5, 6, 7 + row] for row in range(3)], [list(range(1 + 8 * row, 9 + 8 * row)) for row in range(3)]
    for position in range(3, 30):
        first = position - 1 if position > 3 else 0
        specs = [replace(spec, position=position) for spec in drawn]
        batch = ScheduledBatch(
            tuple(
                SequenceSlice(known[first:], first, table, (spec,))
                for known, table, spec in zip(tokens, blocks, specs, strict=True)
            )
        )
        result = engine.runner.execute(batch)
        found = [item.tokens[0].token_id for item in result.slices]
        if position > 3:
            logits = engine.runner.compute_logits(batch).cpu()
            assert found == [item.token_id for item in sample(logits, specs, range(3))]
        for known, token_id in zip(tokens, found, strict=True):
            known.append(token_id)
    assert not steps.drawn_behind


def test_steps_are_launched_ahead_with_draws_on_the_device() -> None:
    engine = build("random:smollm2-135m")
    spec = DRAWS[1]
    item = SequenceSlice([5, 6, 7], 0, [1, 2], (replace(spec, position=3),))
    first = engine.runner.execute(ScheduledBatch((item,))).slices[0].tokens[0].token_id
    answers = []
    for ahead in (False, True):
        token, found, before = first, [], None
        for position in range(3, 20):
            following = SequenceSlice([token], position, [1, 2], (replace(spec, position=position + 1),))
            step = engine.runner.launch(ScheduledBatch((following,)))
            if before is not None:
                found.append(before.collect().slices[0].tokens[0].token_id)
            before, token = step, -1
            if not ahead:
                token = step.collect().slices[0].tokens[0].token_id
        assert before is not None
        answers.append([*found, before.collect().slices[0].tokens[0].token_id])
    assert answers[0] == answers[1]


def test_what_a_pool_took_is_given_back_with_it() -> None:
    for _ in range(3):
        engine = build("random:smollm2-135m", dtype="bfloat16", device_memory_share=0.6)
        assert engine.pool.tensor.nbytes > 0.4 * torch.cuda.get_device_properties(0).total_memory
        del engine
        gc.collect()


def test_blocks_come_back_from_the_host_before_the_next_step_reads_them() -> None:
    engine = build("random:smollm2-135m")
    region = SwapRegion(engine.pool, 4 * engine.layout.block_bytes)
    engine.pool.tensor[1:3].normal_()
    before = engine.pool.tensor[1:3].clone()
    region.move([], [(1, 0), (2, 1)])
    engine.pool.tensor[1:3].zero_()
    region.move([(0, 5), (1, 6)], [])
    assert torch.equal(engine.pool.tensor[5:7], before)
    region.move([], [(5, 2)])
    assert region.moved_bytes == 5 * engine.layout.block_bytes
    assert region.moving_s > 0


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
