"""The KV memory of a worker: one allocation, cut into blocks.

    [block][layer][kv_head][K,V][token][row]              block i = bytes [i * block_bytes, (i + 1) * block_bytes)

A row is `head_dim` values, or rounded to 8 bits what `rounded_rows` makes of them: then `tensor` holds bytes, written rows are
rounded and gathered ones are values again.

A block is contiguous, and so is a range of its layers, and a range of the heads of one layer: what is shipped is never gathered.
Reads and writes are vectorised over index tensors that a step computes once and shifts per layer:

    a run  = (block, layer, kv_head, K or V): `block_tokens` rows; gathers copy runs
    a row  = one token of a run; writes scatter rows

Block 0 is the null block: all zero, written by nobody, owned by nobody. Padding of block tables points there. A
sequence that enters a block clears what it does not fill (`clear_tail`), so that no stale NaN, as a broken transfer
may leave it, is ever multiplied by the zero weight of a masked position.

The pool knows neither sequences nor who owns a block (`block_manager`), and it does not know where given memory came from.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from common.engine.rounded_rows import round_rows, widen_rows
from common.errors import EngineFailure
from common.types import KVLayout

NULL_BLOCK = 0
FIRST_BLOCK = 1
"""The first block that a block manager may hand out."""


class KVPool:
    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        device: torch.device,
        memory: memoryview | torch.Tensor | None = None,
    ) -> None:
        """Over `memory` (writable, at least num_blocks * block_bytes; a tensor is on the device), or over memory of its own."""
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = device
        self._values_dtype: torch.dtype = getattr(torch, layout.values_dtype)
        self._dtype = torch.int8 if layout.is_rounded else self._values_dtype
        row_values = layout.row_bytes // layout.dtype_bytes
        shape = (num_blocks, layout.num_layers, layout.num_kv_heads, 2, layout.block_tokens, row_values)
        if memory is None:
            self.tensor = torch.zeros(shape, dtype=self._dtype, device=device)
        else:
            self.tensor = self._over(memory, num_blocks * layout.block_bytes).view(shape)
            self.tensor[NULL_BLOCK].zero_()  # not all: that would touch every page of a pool that may never fill
        self._runs = self.tensor.view(-1, layout.block_tokens * row_values)
        self._rows = self.tensor.view(-1, row_values)
        self._halves = torch.arange(2, device=device)
        self._runs_per_layer = layout.num_kv_heads * 2
        self._runs_per_block = layout.num_layers * self._runs_per_layer
        self._head_runs = torch.arange(layout.num_kv_heads, device=device) * 2  # of the first layer

    def _over(self, memory: memoryview | torch.Tensor, num_bytes: int) -> torch.Tensor:
        if isinstance(memory, torch.Tensor):
            if memory.device.type != self.device.type or memory.nbytes < num_bytes:
                raise EngineFailure(f"a KV pool needs {num_bytes} bytes on {self.device}, got {memory.nbytes} on {memory.device}")
            return memory.view(torch.uint8)[:num_bytes].view(self._dtype)
        if self.device.type != "cpu":
            raise EngineFailure("a KV pool over given memory lives on the CPU")
        if memory.readonly or memory.nbytes < num_bytes:
            raise EngineFailure(f"a KV pool needs {num_bytes} writable bytes, got {memory.nbytes}")
        return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes).view(self._dtype)

    @property
    def buffer(self) -> memoryview:
        """All blocks as bytes; shares the memory. CPU only."""
        if self.device.type != "cpu":
            raise EngineFailure("only a KV pool on the CPU has a buffer")
        flat: npt.NDArray[np.uint8] = self.tensor.view(-1).view(torch.uint8).numpy()
        return flat.data

    @property
    def rows(self) -> torch.Tensor:
        """All memory as rows: what a `write_index` counts, from the row of the layer on."""
        return self._rows

    @property
    def rows_per_layer(self) -> int:
        return self._runs_per_layer * self.layout.block_tokens

    def copy_block(self, source: int, destination: int) -> None:
        """Copies every layer of one block (a fork is about to write into a block that it shares)."""
        self.tensor[destination].copy_(self.tensor[source])

    def clear_tail(self, block: int, first_token: int) -> None:
        """Zeroes the tokens `first_token ..` of a block in every layer."""
        self.tensor[block, :, :, :, first_token:].zero_()

    def write_index(self, slots: torch.Tensor) -> torch.Tensor:
        """Rows of layer 0 for tokens in `slots` (`block * block_tokens + offset`): [tokens, kv_heads, 2]."""
        block_tokens = self.layout.block_tokens
        runs = (slots // block_tokens)[:, None, None] * self._runs_per_block + self._head_runs[:, None] + self._halves
        return runs * block_tokens + (slots % block_tokens)[:, None, None]

    def write(self, layer: int, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores keys and values [tokens, kv_heads, head_dim] of one layer at a `write_index`."""
        rows = index + layer * self.rows_per_layer
        both = torch.stack((keys, values), dim=2).view(-1, self.layout.head_dim)
        self._rows.index_copy_(0, rows.view(-1), round_rows(both) if self.layout.is_rounded else both)

    def gather_index(self, block_tables: torch.Tensor) -> torch.Tensor:
        """Runs of layer 0 for block tables [sequences, blocks]: [2, sequences, kv_heads, blocks]."""
        return (
            block_tables[None, :, None, :] * self._runs_per_block
            + self._head_runs[None, None, :, None]
            + self._halves[:, None, None, None]
        )

    def gather(self, layer: int, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer at a `gather_index`: two of [sequences, kv_heads, blocks * block_tokens, head_dim]."""
        _, sequences, heads, blocks = index.shape
        runs = self._runs.index_select(0, (index + layer * self._runs_per_layer).view(-1))
        both = runs.view(2, sequences, heads, blocks * self.layout.block_tokens, -1)
        if self.layout.is_rounded:
            both = widen_rows(both, self.layout.head_dim, self._values_dtype)
        return both[0], both[1]
