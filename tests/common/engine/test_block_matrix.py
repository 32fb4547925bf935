"""Blocks of weights against the gguf package's own dequantisation, and panels of them weight by weight."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine.block_matrix import BlockKind, BlockMatrix
from common.engine.loader import ModelArchitecture
from common.engine.native.panels import Held, ModelPanels, block_panels
from common.engine.quantisation import WeightFormat, rounded_matrix
from common.errors import EngineFailure


def stored(kind: BlockKind, outputs: int, inputs: int, seed: int = 0) -> tuple[BlockMatrix, torch.Tensor]:
    """A matrix as a file has it, and its weights as the gguf package reads them."""
    values = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)).numpy() + 0.3
    data = quantize(values, GGMLQuantizationType[kind.value])
    return BlockMatrix(kind, torch.from_numpy(data), inputs), torch.from_numpy(dequantize(data, GGMLQuantizationType[kind.value]))


@pytest.mark.parametrize("kind", BlockKind)
def test_weights_are_those_that_the_gguf_package_reads(kind: BlockKind) -> None:
    matrix, weights = stored(kind, 40, 160)
    assert matrix.shape == (40, 160)
    assert torch.equal(matrix.dequantised(), weights)
    assert torch.equal(matrix.rows(range(3, 17)).dequantised(), weights[3:17])
    assert torch.equal(matrix.columns(range(32, 96)).dequantised(), weights[:, 32:96])
    assert torch.equal(BlockMatrix.joined([matrix, matrix]).dequantised(), torch.cat([weights, weights]))
    with pytest.raises(EngineFailure, match="whole blocks"):
        matrix.columns(range(16, 48))


def test_four_bits_without_minima_are_eight_bits_exactly() -> None:
    matrix, weights = stored(BlockKind.Q4, 5, 64)
    wide = matrix.wider_in_file()
    assert wide.kind is BlockKind.Q8
    assert torch.equal(wide.dequantised(), weights)
    with pytest.raises(EngineFailure):
        stored(BlockKind.Q4_MINIMA, 5, 64)[0].wider_in_file()


@settings(max_examples=12, deadline=None)
@given(
    outputs=st.integers(1, 40), inputs=st.integers(1, 100), seed=st.integers(0, 999), scale=st.sampled_from([0.0, 1e-3, 1.0, 1e3])
)
def test_rounded_to_four_bits_no_worse_than_by_the_whole_range(outputs: int, inputs: int, seed: int, scale: float) -> None:
    """The squared error of every block is at most that of 16 even steps from its least to its greatest value."""
    matrix = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * scale
    rounded = BlockMatrix.rounded(matrix)
    back = rounded.dequantised()
    assert back.shape == matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -inputs % 32))
    back = replace(rounded, num_inputs=padded.shape[1]).dequantised()
    for row in range(outputs):
        for first in range(0, inputs, 32):
            block = padded[row, first : first + 32]
            step = float(np.float16(float(block.max() - block.min()) / 15))
            least = float(np.float16(float(block.min())))
            steps = [min(15, max(0, round((value - least) / step))) if step else 0 for value in block.tolist()]
            plain = sum((least + step * count - value) ** 2 for count, value in zip(steps, block.tolist(), strict=True))
            got = float((back[row, first : first + 32] - block).double().square().sum())
            assert got <= plain * 1.001 + 1e-9 * scale**2


def test_weights_that_are_not_numbers_are_refused() -> None:
    matrix = torch.ones(2, 32)
    matrix[1, 3] = torch.nan
    with pytest.raises(EngineFailure, match="not finite"):
        BlockMatrix.rounded(matrix)


@pytest.mark.parametrize("kind", BlockKind)
def test_panels_hold_every_weight_where_the_kernels_look(kind: BlockKind) -> None:
    matrix, weights = stored(kind, 64, 96)
    panels = block_panels(matrix)
    heads = 16 if kind is not BlockKind.Q4_MINIMA else 32
    assert panels.shape == (2, 3, heads + 32 * kind.bits)
    found = torch.empty(64, 96)
    halves_of = panels[:, :, :heads].contiguous().view(torch.float16).tolist()
    words_of = panels[:, :, heads:].tolist()
    for output in range(64):
        for column in range(96):
            halves, words = halves_of[output // 32][column // 32], words_of[output // 32][column // 32]
            scale = halves[output % 32]
            minimum = halves[32 + output % 32] if kind is BlockKind.Q4_MINIMA else 0.0
            place = column % 32
            word = place // 4 if kind is BlockKind.Q8 else place % 16 // 4
            bits = words[word * 32 + output % 32] >> (8 * (place % 4)) & 0xFF
            if kind is not BlockKind.Q8:
                bits = bits >> 4 if place >= 16 else bits & 15
            zero = {BlockKind.Q8: 128, BlockKind.Q4: 8, BlockKind.Q4_MINIMA: 0}[kind]
            found[output, column] = scale * (bits - zero) + minimum
    torch.testing.assert_close(found, weights, rtol=1e-6, atol=1e-7)


def test_what_a_layer_joins_is_held_in_one_kind_or_in_full() -> None:
    architecture = ModelArchitecture("llama", 2, 64, 4, 2, 16, 96, 100, 10_000.0, None, 1e-5, 128, True, False)
    weights: dict[str, torch.Tensor | BlockMatrix] = {}
    for name, shape in architecture.tensor_shapes().items():
        weights[name] = torch.ones(shape) if len(shape) == 1 else stored(BlockKind.Q4, *shape)[0]
    first, second = "model.layers.0.", "model.layers.1."
    weights[first + "self_attn.v_proj.weight"] = stored(BlockKind.Q8, *weights[first + "self_attn.v_proj.weight"].shape)[0]
    weights[second + "self_attn.v_proj.weight"] = stored(BlockKind.Q4_MINIMA, *weights[second + "self_attn.v_proj.weight"].shape)[
        0
    ]
    weights[second + "mlp.down_proj.weight"] = torch.randn(weights[second + "mlp.down_proj.weight"].shape)
    panels = ModelPanels.of(architecture, weights, WeightFormat.FILE, torch.float32)
    assert [layer.qkv.held for layer in panels.layers] == [Held.BLOCKS_8, Held.PLAIN]
    assert [layer.down.held for layer in panels.layers] == [Held.BLOCKS_4, Held.PLAIN]
    assert all(layer.gate_up.held is Held.BLOCKS_4 for layer in panels.layers)
    assert panels.embedding is panels.head, "one copy serves both ends"


def test_the_format_means_these_weights_to_torch_as_well() -> None:
    matrix = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = BlockMatrix.rounded(matrix).dequantised().bfloat16()
    assert torch.equal(rounded_matrix(matrix, WeightFormat.of("int4", "cpu", "auto")), expected)
    assert WeightFormat.of("int4", "cuda", "auto") is WeightFormat.of("int4", "cpu", "triton") is WeightFormat.INT4
