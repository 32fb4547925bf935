"""Paged attention by Triton against the reference, and in exact mode bit by bit against itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.blocks import num_blocks
from common.engine.attention import Span, create_attention
from common.engine.attention.paged import PagedAttention
from common.engine.kv_pool import FIRST_BLOCK, KVPool
from common.engine.triton_kernels import attention_split, configurations
from common.engine.triton_kernels.attention_split import attend_split
from common.types import KVLayout


class Memory:
    """A pool with random keys and values, shuffled block tables, and queries for a step. Other blocks are full of NaN."""

    def __init__(
        self,
        device: torch.device,
        shape: tuple[int, int, int],
        sequences: list[tuple[int, int]],
        block_tokens: int = 16,
        dtype: str = "float32",
    ) -> None:
        heads, kv_heads, head_dim = shape
        counts = [num_blocks(start + rows, block_tokens) for start, rows in sequences]
        layout = KVLayout("model", "tokenizer", 2, kv_heads, head_dim, block_tokens, dtype, exact=False)
        generator = torch.Generator().manual_seed(1)
        self.pool = KVPool(layout, FIRST_BLOCK + sum(counts) + 2, device)
        values = torch.randn(self.pool.tensor[FIRST_BLOCK:].shape, generator=generator)
        self.pool.tensor[FIRST_BLOCK:] = values.to(self.pool.tensor.dtype).to(device)
        self.pool.tensor[-2:] = torch.nan
        order = (torch.randperm(sum(counts), generator=generator) + FIRST_BLOCK).tolist()
        tables = torch.zeros(len(sequences), max(counts), dtype=torch.int64)
        self.spans: list[Span] = []
        row = 0
        for table, count, (start, rows) in zip(tables, counts, sequences, strict=True):
            table[:count] = torch.tensor([order.pop() for _ in range(count)])
            if (start + rows) % block_tokens:  # what lies beyond the sequence is never looked at
                self.pool.tensor[int(table[count - 1]), :, :, :, (start + rows) % block_tokens :] = torch.nan
            self.spans.append(Span(row, rows, start))
            row += rows
        self.tables = tables.to(device)
        self.heads = heads
        queries = torch.randn(row, heads, head_dim, generator=generator) * 2
        self.queries = queries.to(self.pool.tensor.dtype).to(device)

    def attend(self, backend: str, window: int = 0) -> torch.Tensor:
        return create_attention(backend, self.pool, self.heads).plan(self.tables, self.spans).attend(1, self.queries, window)

    def some(self, backend: str, rows: slice, start: int, window: int, sequence: int = 0) -> torch.Tensor:
        """Rows of the queries as tokens `start ..` of a sequence, alone."""
        span = Span(0, rows.stop - rows.start, start)
        plan = create_attention(backend, self.pool, self.heads).plan(self.tables[sequence : sequence + 1], [span])
        return plan.attend(1, self.queries[rows], window)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


MIXED = [(37, 20), (5, 1), (63, 1), (64, 2)]


@pytest.mark.parametrize(
    ("backend", "shape", "window"), [("paged", (4, 2, 16), 0), ("paged_exact", (2, 2, 10), 24), ("paged", (20, 1, 8), 1)]
)
def test_a_mixed_step_agrees_with_the_reference(
    device: torch.device, backend: str, shape: tuple[int, int, int], window: int
) -> None:
    memory = Memory(device, shape, MIXED)
    close(memory.attend(backend, window), memory.attend("reference", window))


@pytest.mark.long
@settings(max_examples=12, deadline=None)
@given(
    backend=st.sampled_from(["paged", "paged_exact"]),
    shape=st.sampled_from([(4, 2, 16), (3, 3, 40), (7, 1, 24)]),
    sequences=st.lists(
        st.tuples(st.sampled_from([0, 1, 15, 16, 31, 100]), st.sampled_from([1, 2, 5, 17, 40])), min_size=1, max_size=4
    ),
    block_tokens=st.sampled_from([1, 7, 16, 64]),
    window=st.sampled_from([0, 1, 16, 33, 1000]),
    dtype=st.sampled_from(["float32", "float16"]),
)
def test_any_step_agrees_with_the_reference(
    backend: str, shape: tuple[int, int, int], sequences: list[tuple[int, int]], block_tokens: int, window: int, dtype: str
) -> None:
    memory = Memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"), shape, sequences, block_tokens, dtype)
    close(memory.attend(backend, window), memory.attend("reference", window), 2e-5 if dtype == "float32" else 4e-3)


def test_every_number_of_splits_gives_the_same(device: torch.device) -> None:
    memory = Memory(device, (4, 2, 16), [(199, 1), (0, 1)])
    expected = memory.attend("reference")
    tiling = configurations.tiling("split", torch.float32, 16, 2)
    tiles = torch.tensor([[row, 1, span.start, row] for row, span in enumerate(memory.spans)], dtype=torch.int32, device=device)
    for splits in (1, 20):  # more than are merged at once, and more than there are tiles of KV
        output = torch.full_like(memory.queries, torch.nan)
        attend_split(
            memory.queries,
            memory.pool,
            1,
            memory.tables,
            tiles,
            output,
            tiling=tiling,
            most_tokens=1,
            num_splits=splits,
            split_tokens=0,
            window=0,
        )
        close(output, expected)


def test_a_row_that_sees_nothing_is_zero_and_a_tile_without_tokens_is_left_alone(device: torch.device) -> None:
    memory = Memory(device, (4, 2, 16), [(20, 1), (3, 1), (0, 1)])
    tiling = configurations.tiling("split", torch.float32, 16, 2)
    tiles = torch.tensor([[0, 1, -1, 0], [1, 0, 3, 1], [2, 1, 0, 2]], dtype=torch.int32, device=device)
    output = torch.full_like(memory.queries, 7.0)
    attend_split(
        memory.queries,
        memory.pool,
        1,
        memory.tables,
        tiles,
        output,
        tiling=tiling,
        most_tokens=2,
        num_splits=2,
        split_tokens=0,
        window=0,
    )
    assert torch.equal(output[0], torch.zeros_like(output[0]))
    assert torch.equal(output[1], torch.full_like(output[1], 7.0))
    first_block = memory.pool.tensor[memory.tables[2, 0], 1, :, 1, 0]  # the values of position 0: all that it sees
    close(output[2], first_block.repeat_interleave(2, dim=0))


def test_broken_memory_is_seen_in_the_result(device: torch.device) -> None:
    memory = Memory(device, (4, 2, 16), [(40, 1), (40, 20)])
    memory.pool.tensor[memory.tables[0, 1], 1, :, 0, 3] = torch.nan
    memory.pool.tensor[memory.tables[1, 1], 1, :, 0, 3] = torch.nan
    assert memory.attend("paged").isnan().all()


@pytest.mark.usefixtures("rows_apart")
@pytest.mark.long
@pytest.mark.parametrize(("shape", "block_tokens", "window"), [((2, 1, 16), 16, 0), ((3, 1, 24), 24, 70)])
def test_an_exact_row_depends_on_nothing_but_itself(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], block_tokens: int, window: int
) -> None:
    """Chunk borders, company, splits of its neighbours and the pieces of a launch change no bit; splits are short, so that rows
    have several."""
    monkeypatch.setattr("common.engine.attention.paged.EXACT_SPLIT_TOKENS", 64)
    length = 80
    memory = Memory(device, shape, [(0, length), (3, 1), (130, 3)], block_tokens)
    whole = memory.attend("paged_exact", window)
    for chunk, starts in ((1, (0, 63, 64, 79)), (7, (60,)), (31, (40,))):
        for start in starts:
            rows = slice(start, min(start + chunk, length))
            assert torch.equal(memory.some("paged_exact", rows, start, window), whole[rows]), (chunk, start)
    monkeypatch.setattr("common.engine.attention.paged._SCRATCH_BYTES", 5_000)
    plan = PagedAttention.exact(memory.pool, memory.heads).plan(memory.tables, memory.spans)
    assert len(plan._short) > 2
    assert torch.equal(plan.attend(1, memory.queries, window), whole)


def test_the_bitwise_comparison_can_fail(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast backend, with tiles of its own for chunks, gives other bits for a row in a chunk than for the row alone: the test
    above is not vacuous."""
    monkeypatch.setitem(configurations.TILINGS, ("prefill", 4, 128), configurations.Tiling(32, 16, 4, 2))
    memory = Memory(device, (3, 1, 24), [(0, 90)])
    whole = memory.attend("paged")
    assert any(not torch.equal(memory.some("paged", slice(i, i + 1), i, 0), whole[i : i + 1]) for i in (40, 70, 89))


def test_more_parts_than_are_merged_at_once_are_merged_in_order(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.engine.attention.paged.EXACT_SPLIT_TOKENS", 32)
    monkeypatch.setitem(configurations.TILINGS, ("exact", 4, 128), configurations.Tiling(16, 32, 4, 2))
    assert attention_split.MERGED_AT_ONCE < 541 / 32
    memory = Memory(device, (2, 1, 16), [(540, 1), (40, 1)])
    together = memory.attend("paged_exact")
    close(together, memory.attend("reference"))
    assert torch.equal(memory.some("paged_exact", slice(1, 2), 40, 0, sequence=1), together[1:])


def test_the_table_has_an_entry_for_every_kernel_and_fits_into_a_multiprocessor() -> None:
    for (kernel, size, width), entry in configurations.TILINGS.items():
        query_bytes = entry.rows * width * size
        assert entry.staged_bytes(width, size) + entry.tile_bytes(width, size) + query_bytes <= configurations.SHARED_BYTES, (
            kernel,
            size,
            width,
        )
        if kernel == "exact":
            assert configurations.EXACT_SPLIT_TOKENS % entry.kv_tile == 0
    for kernel in ("split", "exact", "prefill"):
        for dtype in (torch.bfloat16, torch.float32):
            for head_dim, group in ((10, 1), (64, 3), (128, 4), (256, 20)):
                assert configurations.tiling(kernel, dtype, head_dim, group).rows >= group
