"""Rows in 8 bits, value by value, and a pool of them against a pool of values."""

from __future__ import annotations

import math

import pytest
import torch

from common.engine.kv_pool import KVPool
from common.engine.rounded_rows import round_rows, widen_rows
from common.types import KVLayout


@pytest.mark.parametrize("head_dim", [2, 6, 8, 64])
def test_values_are_at_most_half_a_step_away(head_dim: int) -> None:
    rows = torch.randn(50, head_dim, generator=torch.Generator().manual_seed(head_dim)) * torch.logspace(-6, 6, 50)[:, None]
    rounded = round_rows(rows)
    assert rounded.shape == (50, -(-head_dim // 4) * 4 + 4)
    for row, back, bytes_of in zip(rows, widen_rows(rounded, head_dim, torch.float32), rounded, strict=True):
        step = max(abs(value) for value in row.tolist()) / 127
        assert bytes_of[-4:].view(torch.float32).item() == pytest.approx(step)
        assert all(abs(one - other) <= 0.501 * step for one, other in zip(row.tolist(), back.tolist(), strict=True))


def test_zeros_and_what_is_no_number() -> None:
    rows = torch.zeros(4, 8)
    rows[1, 3], rows[2, 3], rows[3, 3] = math.nan, math.inf, 1e-38
    back = widen_rows(round_rows(rows), 8, torch.float32)
    assert not round_rows(rows)[0].any()
    assert not back[0].any()
    assert back[1].isnan().all()
    assert back[2].isnan().all()
    assert not back[3].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pool_rounds_what_is_written_and_gathers_values(dtype: str) -> None:
    plain = KVPool(KVLayout("m", "t", 3, 2, 6, 4, dtype, False), 7, torch.device("cpu"))
    rounding = KVPool(KVLayout("m", "t", 3, 2, 6, 4, f"int8-{dtype}", False), 7, torch.device("cpu"))
    assert rounding.buffer.nbytes == 7 * 3 * 2 * 2 * 4 * 12
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(3, 2, 6, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
    slots = torch.tensor([5, 24, 11])
    for pool in (plain, rounding):
        pool.write(1, pool.write_index(slots), keys, values)
    tables = torch.tensor([[1, 6], [2, 0]])
    expected = plain.gather(1, plain.gather_index(tables))
    got = rounding.gather(1, rounding.gather_index(tables))
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0.01, atol=0.03)
        assert torch.equal((one == 0).all(-1), (other == 0).all(-1))
    rounding.clear_tail(6, 0)
    assert not rounding.tensor[6].any()
