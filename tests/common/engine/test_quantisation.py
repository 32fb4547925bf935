"""Rounding to 8 bits against arithmetic written down anew, and what an engine makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.quality import docstrings, judge
from common.config import EngineConfig
from common.engine.engine import build_engine
from common.engine.native.panels import quantised_panels
from common.engine.quantisation import dequantise, quantise, rounded_weights
from common.model_store import ModelFiles
from common.tokenizer import Tokenizer
from support.tiny_models import make_tiny_model


@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 40), inputs=st.integers(1, 200), seed=st.integers(0, 999), scale=st.sampled_from([0.0, 1e-6, 1.0, 1e4])
)
def test_no_value_moves_by_more_than_half_a_step(outputs: int, inputs: int, seed: int, scale: float) -> None:
    matrix = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * scale
    rounded, scales = quantise(matrix)
    assert rounded.shape == (outputs, -(-inputs // 64) * 64)
    back = dequantise(rounded, scales, inputs)
    for row in range(outputs):
        for first in range(0, inputs, 64):
            part = matrix[row, first : first + 64]
            step = float(part.abs().max()) / 127
            assert float((back[row, first : first + 64] - part).abs().max()) <= 0.5001 * step
    assert torch.equal(rounded[:, inputs:], torch.zeros_like(rounded[:, inputs:]))


def test_panels_hold_every_weight_and_scale_where_the_kernels_look() -> None:
    matrix = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    rounded, scales = quantise(matrix)
    panels = quantised_panels(matrix)
    assert panels.shape == (2, 2, 17, 32)
    for output in range(40):
        for column in range(100):
            group, word, byte = column // 64, column % 64 // 4, column % 4
            bits = int(panels[output // 32, group, 1 + word, output % 32]) >> (8 * byte) & 0xFF
            assert bits - 128 == int(rounded[output, column])
        for group in range(2):
            assert panels[output // 32, group, 0, output % 32].view(torch.float32) == scales[output, group]


def test_torch_gets_the_same_model_with_rounded_layers() -> None:
    weights = {
        "model.embed_tokens.weight": torch.randn(8, 64),
        "model.layers.0.mlp.up_proj.weight": torch.randn(8, 64).bfloat16(),
        "model.layers.0.input_layernorm.weight": torch.randn(64),
    }
    rounded = rounded_weights(weights)
    assert rounded["model.embed_tokens.weight"] is weights["model.embed_tokens.weight"]
    assert rounded["model.layers.0.input_layernorm.weight"] is weights["model.layers.0.input_layernorm.weight"]
    up, before = rounded["model.layers.0.mlp.up_proj.weight"], weights["model.layers.0.mlp.up_proj.weight"]
    assert up.dtype == torch.bfloat16
    assert not torch.equal(up, before)
    torch.testing.assert_close(up, before, rtol=0, atol=0.03)


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_rounded_and_whole_weights_do_not_exchange_kv(tmp_path: Path, kernels: str) -> None:
    path = make_tiny_model(tmp_path / "tiny")
    fingerprints = set()
    for weights in ("model", "int8"):
        config = EngineConfig(device="cpu", dtype="float32", kernels=kernels, weights=weights, kv_pool_tokens=256)
        engine = build_engine(path, config, threads=1, model_digest="m", tokenizer_digest="t")
        fingerprints.add(engine.layout.fingerprint)
    assert len(fingerprints) == 2


@pytest.mark.model
def test_few_bits_cost_less_than_a_percent_of_perplexity(smollm2: ModelFiles) -> None:
    """On docstrings of the standard library; `benchmarks/quality.py` reads more of them."""
    tokenizer = Tokenizer.load(smollm2.path)
    texts = [tokenizer.encode(docstrings(name))[:768] for name in ("argparse", "statistics", "difflib", "textwrap")]
    losses = []
    for weights in ("model", "int8", "file"):
        config = EngineConfig(device="cpu", dtype="bfloat16", kernels="native", weights=weights, kv_pool_tokens=1024)
        engine = build_engine(smollm2.path, config, threads=1, model_digest="m", tokenizer_digest="t")
        losses.append(sum(judge(engine, token_ids)[0] for token_ids in texts) / sum(len(token_ids) - 1 for token_ids in texts))
    assert losses[0] > 1.0, "a text that the model knows by heart tells nothing"
    assert max(losses[1:]) - losses[0] < 0.01
