"""The KV pool against plain indexing, element by element."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.engine.kv_pool import NULL_BLOCK, KVPool
from common.errors import EngineFailure
from common.types import KVLayout

CPU = torch.device("cpu")


def make_layout(block_tokens: int = 4, dtype: str = "float32") -> KVLayout:
    return KVLayout("model", "tokenizer", 3, 2, 6, block_tokens, dtype, exact=False)


def random_pool(num_blocks: int = 7, block_tokens: int = 4, dtype: str = "float32") -> KVPool:
    pool = KVPool(make_layout(block_tokens, dtype), num_blocks, CPU)
    pool.tensor[1:] = torch.randn(pool.tensor[1:].shape, generator=torch.Generator().manual_seed(0))
    return pool


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_block_is_one_range_of_bytes_in_the_stated_order(dtype: str) -> None:
    pool = random_pool(dtype=dtype)
    layout = pool.layout
    assert pool.buffer.nbytes == 7 * layout.block_bytes
    for block in range(7):
        piece = bytes(pool.buffer[block * layout.block_bytes : (block + 1) * layout.block_bytes])
        values = torch.frombuffer(bytearray(piece), dtype=getattr(torch, dtype))
        position = 0
        for layer in range(layout.num_layers):
            for head in range(layout.num_kv_heads):
                for half in range(2):
                    for token in range(layout.block_tokens):
                        for dim in range(layout.head_dim):
                            assert values[position] == pool.tensor[block, layer, head, half, token, dim]
                            position += 1


@pytest.mark.parametrize("block_tokens", [1, 4, 5])
def test_written_keys_and_values_land_in_their_slots_and_nowhere_else(block_tokens: int) -> None:
    pool = random_pool(block_tokens=block_tokens)
    before = pool.tensor.clone()
    slots = [6 * block_tokens, 2 * block_tokens + block_tokens - 1, 3 * block_tokens]
    keys, values = torch.randn(3, 2, 6), torch.randn(3, 2, 6)
    pool.write(1, pool.write_index(torch.tensor(slots)), keys, values)
    expected = before
    for row, slot in enumerate(slots):
        for head in range(2):
            expected[slot // block_tokens, 1, head, 0, slot % block_tokens] = keys[row, head]
            expected[slot // block_tokens, 1, head, 1, slot % block_tokens] = values[row, head]
    assert torch.equal(pool.tensor, expected)


@pytest.mark.parametrize("block_tokens", [1, 4, 5])
def test_gathers_follow_the_block_tables(block_tokens: int) -> None:
    pool = random_pool(block_tokens=block_tokens)
    tables = [[3, 1, 6], [2, NULL_BLOCK, NULL_BLOCK]]
    for layer in range(3):
        keys, values = pool.gather(layer, pool.gather_index(torch.tensor(tables)))
        assert keys.shape == values.shape == (2, 2, 3 * block_tokens, 6)
        for sequence, table in enumerate(tables):
            for position in range(3 * block_tokens):
                block, offset = table[position // block_tokens], position % block_tokens
                for head in range(2):
                    assert torch.equal(keys[sequence, head, position], pool.tensor[block, layer, head, 0, offset])
                    assert torch.equal(values[sequence, head, position], pool.tensor[block, layer, head, 1, offset])


def test_the_null_block_is_zero_also_when_memory_was_given_dirty() -> None:
    layout = make_layout()
    memory = bytearray(b"\xff" * (4 * layout.block_bytes + 5))
    pool = KVPool(layout, 4, CPU, memoryview(memory))
    assert not pool.tensor[0].any()
    assert memory[-5:] == b"\xff" * 5


def test_given_memory_is_the_memory_that_is_used() -> None:
    layout = make_layout()
    memory = bytearray(4 * layout.block_bytes)
    pool = KVPool(layout, 4, CPU, memoryview(memory))
    pool.tensor[2] = 1.5
    assert set(np.frombuffer(memory, dtype=np.float32)[2 * layout.block_bytes // 4 : 3 * layout.block_bytes // 4]) == {1.5}
    memory[3 * layout.block_bytes : 3 * layout.block_bytes + 4] = np.float32(7).tobytes()
    assert pool.tensor[3].flatten()[0] == 7
    pool.buffer[0:4] = np.float32(9).tobytes()
    assert np.frombuffer(memory, dtype=np.float32)[0] == 9


def test_memory_that_cannot_serve_is_refused() -> None:
    layout = make_layout()
    with pytest.raises(EngineFailure, match="writable"):
        KVPool(layout, 4, CPU, memoryview(bytes(4 * layout.block_bytes)))
    with pytest.raises(EngineFailure, match="writable"):
        KVPool(layout, 4, CPU, memoryview(bytearray(4 * layout.block_bytes - 1)))


def test_copy_block_copies_all_layers() -> None:
    pool = random_pool()
    before = pool.tensor.clone()
    pool.copy_block(5, 2)
    assert torch.equal(pool.tensor[2], before[5])
    untouched = [0, 1, 3, 4, 5, 6]
    assert torch.equal(pool.tensor[untouched], before[untouched])


def test_clear_tail_keeps_the_first_tokens() -> None:
    pool = random_pool()
    pool.tensor[3, :, :, :, 3] = torch.nan
    before = pool.tensor.clone()
    pool.clear_tail(3, 2)
    assert torch.equal(pool.tensor[3, :, :, :, :2], before[3, :, :, :, :2])
    assert not pool.tensor[3, :, :, :, 2:].any()
    assert torch.equal(pool.tensor[4:], before[4:])
