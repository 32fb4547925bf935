"""Every attention backend against the reference, and the tiled one bit by bit against itself."""

from __future__ import annotations

import pytest
import torch

from common.blocks import num_blocks
from common.engine.attention import Span, create_attention
from common.engine.kv_pool import FIRST_BLOCK, KVPool
from common.types import KVLayout

CPU = torch.device("cpu")
# query heads, KV heads, head_dim: grouped, odd group, no groups, a group wider than a query tile
SHAPES = [(4, 2, 16), (9, 3, 64), (4, 4, 10), (20, 1, 8)]
# (start, rows) of the sequences of a step
STEPS = [
    [(0, 1)],
    [(0, 70)],
    [(65, 1), (0, 1), (300, 1), (130, 1)],
    [(37, 20), (5, 1), (0, 33), (63, 1), (64, 2), (128, 64)],
]


class Memory:
    """A pool with random keys and values, shuffled block tables, and queries for a step."""

    def __init__(
        self, shape: tuple[int, int, int], sequences: list[tuple[int, int]], block_tokens: int, dtype: str = "float32"
    ) -> None:
        heads, kv_heads, head_dim = shape
        counts = [num_blocks(start + rows, block_tokens) for start, rows in sequences]
        layout = KVLayout("model", "tokenizer", 2, kv_heads, head_dim, block_tokens, dtype, exact=False)
        generator = torch.Generator().manual_seed(1)
        self.pool = KVPool(layout, FIRST_BLOCK + sum(counts), CPU)
        self.pool.tensor[FIRST_BLOCK:] = torch.randn(self.pool.tensor[FIRST_BLOCK:].shape, generator=generator)
        order = (torch.randperm(sum(counts), generator=generator) + FIRST_BLOCK).tolist()
        self.tables = torch.zeros(len(sequences), max(counts), dtype=torch.int64)
        self.spans: list[Span] = []
        row = 0
        for table, count, (start, rows) in zip(self.tables, counts, sequences, strict=True):
            table[:count] = torch.tensor([order.pop() for _ in range(count)])
            self.spans.append(Span(row, rows, start))
            row += rows
        self.heads = heads
        self.queries = torch.randn(row, heads, head_dim, generator=generator).mul_(2).to(self.pool.tensor.dtype)

    def attend(self, backend: str, window: int = 0) -> torch.Tensor:
        return create_attention(backend, self.pool, self.heads).plan(self.tables, self.spans).attend(1, self.queries, window)


@pytest.mark.parametrize("backend", ["fast", "tiled"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", STEPS)
def test_backends_agree_with_the_reference(backend: str, shape: tuple[int, int, int], step: list[tuple[int, int]]) -> None:
    memory = Memory(shape, step, block_tokens=16)
    torch.testing.assert_close(memory.attend(backend), memory.attend("reference"), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["fast", "tiled"])
@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("window", [1, 16, 50, 64, 150, 1000])
def test_backends_agree_with_the_reference_about_windows(
    backend: str, shape: tuple[int, int, int], step: list[tuple[int, int]], window: int
) -> None:
    memory = Memory(shape, step, block_tokens=16)
    torch.testing.assert_close(memory.attend(backend, window), memory.attend("reference", window), rtol=1e-5, atol=2e-5)


def test_the_reference_sees_the_last_tokens_of_a_window() -> None:
    memory = Memory((4, 2, 16), [(0, 40)], 16)
    blocks = memory.pool.tensor[memory.tables[0], 1]
    keys, values = blocks.permute(2, 1, 0, 3, 4).reshape(2, 2, 48, 16)[:, :, :40].repeat_interleave(2, dim=1)
    positions = torch.arange(40)
    seen = (positions <= positions[:, None]) & (positions > positions[:, None] - 7)
    expected = torch.nn.functional.scaled_dot_product_attention(memory.queries.transpose(0, 1), keys, values, attn_mask=seen)
    torch.testing.assert_close(memory.attend("reference", 7), expected.transpose(0, 1), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["fast", "tiled"])
@pytest.mark.parametrize("block_tokens", [1, 7, 24, 64, 100])
def test_any_block_size_will_do(backend: str, block_tokens: int) -> None:
    memory = Memory((4, 2, 16), STEPS[3], block_tokens)
    torch.testing.assert_close(memory.attend(backend), memory.attend("reference"), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["fast", "tiled"])
def test_bfloat16_agrees_to_its_own_precision(backend: str) -> None:
    memory = Memory((9, 3, 64), STEPS[3], 16, "bfloat16")
    torch.testing.assert_close(memory.attend(backend), memory.attend("reference"), rtol=2e-2, atol=2e-2)


def test_the_reference_is_plain_causal_attention() -> None:
    memory = Memory((4, 2, 16), [(0, 40)], 16)
    blocks = memory.pool.tensor[memory.tables[0], 1]  # [blocks, kv_heads, 2, tokens, head_dim]
    keys, values = blocks.permute(2, 1, 0, 3, 4).reshape(2, 2, 48, 16)[:, :, :40].repeat_interleave(2, dim=1)
    expected = torch.nn.functional.scaled_dot_product_attention(memory.queries.transpose(0, 1), keys, values, is_causal=True)
    torch.testing.assert_close(memory.attend("reference"), expected.transpose(0, 1), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_tokens", [16, 24])
@pytest.mark.parametrize(("dtype", "window"), [("float32", 0), ("bfloat16", 0), ("float32", 70)])
def test_a_tiled_row_depends_on_nothing_but_itself(
    shape: tuple[int, int, int], block_tokens: int, dtype: str, window: int
) -> None:
    length = 150
    memory = Memory(shape, [(0, length), (3, 1), (90, 30)], block_tokens, dtype)
    whole = memory.attend("tiled", window)
    backend = create_attention("tiled", memory.pool, memory.heads)
    for chunk in (1, 7, 64, 149):
        for start in range(0, length, chunk):
            rows = slice(start, min(start + chunk, length))
            part = backend.plan(memory.tables[:1], [Span(0, rows.stop - start, start)]).attend(1, memory.queries[rows], window)
            assert torch.equal(part, whole[rows])
    pairs = backend.plan(memory.tables[[1, 0]], [Span(0, 1, 3), Span(1, 1, 77)])
    assert torch.equal(pairs.attend(1, memory.queries[[length, 77]], window), whole[[length, 77]])


def test_the_bitwise_comparison_can_fail() -> None:
    """The fast backend gives other bits for a row in a chunk than for the row alone: the test above is not vacuous."""
    memory = Memory((9, 3, 64), [(0, 150)], 16)
    whole = memory.attend("fast")
    backend = create_attention("fast", memory.pool, memory.heads)
    alone = [backend.plan(memory.tables, [Span(0, 1, i)]).attend(1, memory.queries[i : i + 1]) for i in range(150)]
    assert not torch.equal(torch.cat(alone), whole)
