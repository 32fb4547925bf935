"""Norms, heads and activations by Triton against torch, and rows against themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine.kv_pool import KVPool
from common.engine.layers.activation import gated_gelu, gated_silu
from common.engine.layers.norm import OffsetRMSNorm, RMSNorm
from common.engine.layers.rotary import RotaryEmbedding
from common.engine.operations import TorchOperations
from common.engine.triton_kernels import gated
from common.engine.triton_kernels.operations import TritonOperations
from common.types import KVLayout

OURS, TORCH = TritonOperations(exact=False), TorchOperations.fast()
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3}


def random(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCES[got.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("width", [64, 100, 1])
@pytest.mark.parametrize("offset", [False, True])
def test_norms_are_those_of_torch(device: torch.device, dtype: torch.dtype, width: int, offset: bool) -> None:
    weight, first_weight = random(device, dtype, width), random(device, dtype, width, seed=1)
    made = (OURS.offset_rms_norm, OffsetRMSNorm) if offset else (OURS.rms_norm, RMSNorm)
    (norm, first), (torch_norm, torch_first) = ((create(weight, 1e-5), create(first_weight, 1e-6)) for create in made)
    rows, added = random(device, dtype, 3, width, seed=2), random(device, dtype, 3, 2 * width, seed=3)[:, :width]
    close(norm(rows), torch_norm(rows))
    close(norm(rows.view(3, 1, width)), torch_norm(rows).view(3, 1, width))
    for before in (None, (first, torch_first)):
        sums, torch_sums = rows.clone(), rows.clone()
        normed = norm.add(sums, added, before and before[0])
        close(normed, torch_norm.add(torch_sums, added, before and before[1]))
        close(sums, torch_sums)


@pytest.mark.parametrize("kind", ["silu", "gelu"])
@pytest.mark.parametrize("width", [3, 1500])
def test_activations_are_those_of_torch(device: torch.device, kind: str, width: int) -> None:
    rows = random(device, torch.float32, 3, 2 * width) * 4
    rows[0, 0], rows[0, 1], rows[1, 0] = 200.0, -200.0, 0.0
    ours, theirs = (gated.gated_silu, gated_silu) if kind == "silu" else (gated.gated_gelu, gated_gelu)
    close(ours(rows), theirs(rows))
    assert torch.equal(ours(rows[1:2]), ours(rows)[1:2])


class Heads:
    """Packed heads of some rows, a pool of two layers to store them in, and norms."""

    def __init__(self, device: torch.device, dtype: str, heads: int, kv_heads: int, head_dim: int, normed: str) -> None:
        layout = KVLayout("m", "t", 2, kv_heads, head_dim, 4, dtype, exact=False)
        self.pools = [KVPool(layout, 6, device) for _ in range(2)]
        kind = self.pools[0].tensor.dtype
        self.packed = random(device, kind, 5, heads + 2 * kv_heads, head_dim)
        self.slots = torch.tensor([7, 4, 23, 8, 9], device=device)
        rotary = RotaryEmbedding(head_dim, 10_000.0, None, 64, device)
        self.angles = rotary.angles(torch.tensor([0, 1, 17, 63, 2], device=device))
        self.heads = heads
        weights = random(device, kind, head_dim, seed=1), random(device, kind, head_dim, seed=2)
        self.norms = [
            None
            if not normed
            else tuple(
                (operations.offset_rms_norm if normed == "offset" else operations.rms_norm)(weight, 1e-6) for weight in weights
            )
            for operations in (OURS, TORCH)
        ]

    def run(self, which: int, rows: slice = slice(None)) -> torch.Tensor:
        pool = self.pools[which]
        angles = self.angles[0][rows], self.angles[1][rows]
        operations = (OURS, TORCH)[which]
        index = pool.write_index(self.slots[rows])
        return operations.turn_and_store(self.packed[rows], self.heads, angles, pool, 1, index, self.norms[which])


@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "head_dim", "normed"),
    [
        ("float32", 4, 2, 16, ""),
        ("float32", 9, 3, 64, "plain"),
        ("float32", 5, 1, 10, "offset"),
        ("float16", 4, 4, 40, "plain"),
    ],
)
def test_heads_are_turned_and_stored_as_by_torch(
    device: torch.device, dtype: str, heads: int, kv_heads: int, head_dim: int, normed: str
) -> None:
    both = Heads(device, dtype, heads, kv_heads, head_dim, normed)
    close(both.run(0), both.run(1))
    close(both.pools[0].tensor, both.pools[1].tensor)  # what belongs to nobody stays 0
    assert not both.pools[0].tensor[:, 0].any()


def test_a_row_depends_on_nothing_but_itself(device: torch.device) -> None:
    both = Heads(device, "float32", 4, 2, 16, "plain")
    queries, stored = both.run(0), both.pools[0].tensor.clone()
    both.pools[0].tensor.zero_()
    assert all(torch.equal(both.run(0, slice(i, i + 1)), queries[i : i + 1]) for i in range(5))
    assert torch.equal(both.pools[0].tensor, stored)
    rows, norm = random(device, torch.float32, 5, 100), OURS.rms_norm(random(device, torch.float32, 100), 1e-5)
    assert all(torch.equal(norm(rows[i : i + 1]), norm(rows)[i : i + 1]) for i in range(5))


@pytest.mark.long
@settings(max_examples=20, deadline=None)
@given(
    dtype=st.sampled_from(["float32", "float16"]),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 5),
    half=st.sampled_from([1, 5, 8, 20, 32]),
    normed=st.sampled_from(["", "plain", "offset"]),
)
def test_any_heads_are_turned_and_stored_as_by_torch(dtype: str, kv_heads: int, group: int, half: int, normed: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    both = Heads(device, dtype, kv_heads * group, kv_heads, 2 * half, normed)
    close(both.run(0), both.run(1))
    close(both.pools[0].tensor, both.pools[1].tensor)
