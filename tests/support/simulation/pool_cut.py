"""How KV lies in one simulated pool: [block][layer][K, V][token][value], as real layouts have it; blocks of any size, and values
of 16 bits or of 32.

    write, read     one token's eight bytes of a layer, wherever its block table says
    all_kv          of the first tokens of a table, in the oracle's order
    block_of        what a block of a prompt must look like

A value of 32 bits is the same number as one of 16 (bfloat16 is the upper half of float32), so its lower half must be zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from common.types import KVLayout
from support.simulation.oracle import KV, NUM_LAYERS, ROW_BYTES

ROW_VALUES = 2  # the head's dimension


@dataclass(frozen=True)
class PoolCut:
    block_tokens: int
    wide: bool = False  # float32; else bfloat16
    exact: bool = True

    @cached_property
    def layout(self) -> KVLayout:
        return KVLayout(
            model_digest="00",
            tokenizer_digest="00",
            num_layers=NUM_LAYERS,
            num_kv_heads=1,
            head_dim=ROW_VALUES,
            block_tokens=self.block_tokens,
            dtype="float32" if self.wide else "bfloat16",
            exact=self.exact,
        )

    @cached_property
    def row_bytes(self) -> int:
        return 2 * ROW_BYTES if self.wide else ROW_BYTES

    @cached_property
    def plane_bytes(self) -> int:
        return self.block_tokens * self.row_bytes

    @cached_property
    def block_bytes(self) -> int:
        return NUM_LAYERS * 2 * self.plane_bytes

    def write(self, content: bytearray, table: Sequence[int], layer: int, position: int, kv: bytes) -> None:
        keys_at, row_bytes = self._place(table, layer, position), self.row_bytes
        values_at = keys_at + self.plane_bytes
        content[keys_at : keys_at + row_bytes] = self._stored(kv[:ROW_BYTES])
        content[values_at : values_at + row_bytes] = self._stored(kv[ROW_BYTES:])

    def read(self, content: bytearray, table: Sequence[int], layer: int, position: int) -> bytes:
        keys_at, row_bytes = self._place(table, layer, position), self.row_bytes
        values_at = keys_at + self.plane_bytes
        return self._numbers(content[keys_at : keys_at + row_bytes]) + self._numbers(content[values_at : values_at + row_bytes])

    def all_kv(self, content: bytearray, table: Sequence[int], num_tokens: int) -> bytes:
        row_bytes, block_tokens = self.row_bytes, self.block_tokens
        tokens_of = [(block, min(block_tokens, num_tokens - index * block_tokens)) for index, block in enumerate(table)]
        starts = [(block * self.block_bytes, tokens * row_bytes) for block, tokens in tokens_of if tokens > 0]
        parts = []
        for plane in range(0, self.block_bytes, self.plane_bytes):
            parts += [content[start + plane : start + plane + size] for start, size in starts]
        return self._numbers(b"".join(parts))

    def block_of(self, kv: KV, logical_block: int) -> bytes:
        """As far as it is filled: shorter if the text ends in it."""
        first, end = logical_block * self.block_tokens * ROW_BYTES, (logical_block + 1) * self.block_tokens * ROW_BYTES
        return self._stored(b"".join([plane[first:end] for planes in kv.planes for plane in planes]))

    def _place(self, table: Sequence[int], layer: int, position: int) -> int:
        """Of a token's K."""
        block, within = table[position // self.block_tokens], position % self.block_tokens
        return block * self.block_bytes + layer * 2 * self.plane_bytes + within * self.row_bytes

    def _stored(self, numbers: bytes) -> bytes:
        if not self.wide:
            return numbers
        stored = bytearray(2 * len(numbers))
        stored[2::4], stored[3::4] = numbers[0::2], numbers[1::2]
        return bytes(stored)

    def _numbers(self, stored: bytes | bytearray) -> bytes:
        if not self.wide:
            return bytes(stored)
        lower = stored[0::4] + stored[1::4]
        numbers = bytearray(len(stored) // 2)
        numbers[0::2], numbers[1::2] = stored[2::4], stored[3::4]
        return bytes(numbers) + (bytes(lower) if any(lower) else b"")
