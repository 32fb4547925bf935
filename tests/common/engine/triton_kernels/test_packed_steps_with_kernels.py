"""Packed decode steps by the kernels: attention that reads lengths on the device, rounded weights and experts by our products."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import EngineConfig
from common.engine.attention import Span, create_attention, create_rows_attention
from common.engine.attention.paged_rows import PagedRowsAttention
from common.engine.batch import SampleSpec, ScheduledBatch, SequenceSlice
from common.engine.captured.buckets import make_buckets
from common.engine.captured.steps import DecodeSteps
from common.engine.engine import Engine, build_engine
from common.engine.gpu_numerics import GpuNumerics
from common.engine.kv_pool import KVPool
from common.engine.quantisation import WeightFormat
from common.engine.runner import ModelRunner
from common.engine.token_rules import Bias, RowRules
from common.types import KVLayout

GREEDY = SampleSpec(position=0, seed=0, choice=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=None)
BANS = RowRules(Bias(np.array([7, 30]), np.array([2.0, 1.0], dtype=np.float32)), banned_token_ids=np.arange(0, 512, 3))
DRAWN = replace(GREEDY, temperature=0.9, top_k=60, top_p=0.9, min_p=0.01, seed=2**64 - 3, rules=BANS)


@pytest.mark.parametrize("window", [0, 20])
def test_rows_see_what_is_before_them_and_in_their_window(device: torch.device, window: int) -> None:
    layout = KVLayout("m", "t", 2, 2, 16, 16, "float32", False)
    pool = KVPool(layout, 30, device)
    pool.tensor.copy_(torch.randn(pool.tensor.shape, generator=torch.Generator().manual_seed(0)))
    lengths = [1, 16, 17, 95, 40]
    tables = torch.randperm(29, generator=torch.Generator().manual_seed(1))[:30].reshape(-1)[: 5 * 5].view(5, 5) + 1
    tables = torch.cat((tables, tables[:, :1]), dim=1).to(device)
    queries = torch.randn(5, 4, 16, generator=torch.Generator().manual_seed(2)).to(device)
    rows = create_rows_attention("paged", pool, 4)
    assert isinstance(rows, PagedRowsAttention)
    got = rows.plan_rows(tables, torch.tensor(lengths, device=device)).attend(1, queries, window)
    spans = [Span(row, 1, length - 1) for row, length in enumerate(lengths)]
    expected = create_attention("reference", pool, 4).plan(tables, spans).attend(1, queries, window)
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-4, atol=1e-4)
    padded = create_rows_attention("fast", pool, 4).plan_rows(tables, torch.tensor(lengths, device=device))
    torch.testing.assert_close(padded.attend(1, queries, window), got, rtol=1e-4, atol=1e-4)


def build(source: str, device: torch.device, kernels: str, weights: str) -> Engine:
    config = EngineConfig(
        device=device.type,
        dtype="float32",
        kv_pool_tokens=256,
        max_model_tokens=64,
        kernels=kernels,
        weights=weights,
        captured_rows=0,
    )
    return build_engine(Path(source), config, threads=1, model_digest="m", tokenizer_digest="t")


def generate(runner: ModelRunner, count: int) -> list[list[int]]:
    """Two sequences, one of them at the end of a block and greedy, the other drawn by rules and filters."""
    tokens = [[5 + place % 50 for place in range(16)], [9, 8, 7]]
    blocks, in_kv = [[1, 2, 3], [4, 5, 6]], [0, 0]
    for _ in range(count):
        slices = tuple(
            SequenceSlice(known[start:], start, table, (replace(spec, position=len(known)),))
            for known, start, table, spec in zip(tokens, in_kv, blocks, (GREEDY, DRAWN), strict=True)
        )
        result = runner.execute(ScheduledBatch(slices))
        in_kv = [len(known) for known in tokens]
        for known, drawn in zip(tokens, result.slices, strict=True):
            known.append(drawn.tokens[0].token_id)
    return tokens


@pytest.mark.long
@pytest.mark.parametrize(("source", "weights"), [("random:toy", "fp8"), ("random:toy-mixture", "int4")])
def test_the_tokens_are_those_of_torch(source: str, weights: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # torch rounds as the kernels do, not as it would on a CPU
        patch.setattr(WeightFormat, "of", lambda weights, device, kernels: WeightFormat(weights))
        plain = build(source, device, "torch", weights)
    engine = build(source, device, "triton", weights)
    rows = create_rows_attention("paged", engine.pool, engine.architecture.num_heads)
    scratch = engine.pool.num_blocks - 1
    packed = engine.runner.without_steps()
    packed.steps = DecodeSteps(
        packed._model,
        engine.pool,
        rows,
        make_buckets(4, 4, one_width=True),
        scratch,
        vocab_size=engine.architecture.vocab_size,
        capture=False,
        draws=engine.runner._operations.row_draws,
    )
    assert generate(packed, 3) == generate(plain.runner, 3)
    assert packed.steps._programs
    assert not packed.steps.drawn_behind


def test_rounded_weights_are_multiplied_by_our_products(device: torch.device) -> None:
    from common.engine.engine_plan import numerics_of
    from common.engine.quantisation import WeightFormat
    from common.engine.triton_kernels.operations import TritonOperations

    numerics = numerics_of(EngineConfig(weights="int4"), TritonOperations(exact=False), WeightFormat.INT4)
    assert isinstance(numerics, GpuNumerics)
    assert numerics.weight_format is WeightFormat.INT4
