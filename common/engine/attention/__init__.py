"""Attention over the KV pool: the choice on one page.

    fast        torch's fused attention for chunks, one padded gather per group of single-token rows
    tiled       fixed tiles in one order: a row's bits depend on that row alone (exact mode)
    paged       Triton kernels that read KV where it lies; of a row's company depend its last bits
    paged_exact the same, in parts and tiles that depend on positions alone (exact mode)
    reference   plain softmax over gathered keys, one row at a time, in fp64: the oracle of the tests

Once per step the runner asks its backend for a plan; per layer the model writes keys and values to the pool, then attends. A row
at position p sees the positions 0..p of its sequence, or the last `window` of them; all of them are in the pool by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from common.engine.kv_pool import KVPool

__all__ = ["AttentionBackend", "AttentionPlan", "RowsAttention", "Span", "create_attention", "create_rows_attention"]


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's rows in a step: rows `first_row ..` are its tokens `start .. start + num_rows - 1`."""

    first_row: int
    num_rows: int
    start: int

    @property
    def end(self) -> int:
        """How many tokens of the sequence are in the pool after this step."""
        return self.start + self.num_rows


class AttentionPlan(Protocol):
    def attend(self, layer: int, queries: torch.Tensor, window: int = 0) -> torch.Tensor:
        """[rows, heads, head_dim] -> the same shape; softmax(q k / sqrt(head_dim)) v over what each row sees: all up to
        itself, or with a window that many tokens, itself among them."""
        ...


class AttentionBackend(Protocol):
    def plan(self, block_tables: torch.Tensor, spans: Sequence[Span]) -> AttentionPlan:
        """For one step. `block_tables` [sequences, blocks] is padded with the null block; row i belongs to `spans[i]`."""
        ...


class RowsAttention(Protocol):
    """Attention of steps whose shape is fixed beforehand: one row of each sequence."""

    @property
    def reads_whole_tables(self) -> bool:
        """Whether its cost grows with the width of the tables rather than with the sequences."""
        ...

    def plan_rows(self, block_tables: torch.Tensor, lengths: torch.Tensor) -> AttentionPlan:
        """`block_tables` [rows, blocks]; row i sees the first `lengths[i]` tokens of its table, the last of which is its own.
        Neither this nor the plan looks at values on the host."""
        ...


BackendCreator = Callable[[KVPool, int], AttentionBackend]


def _fast() -> BackendCreator:
    from common.engine.attention.fast import FastAttention

    return FastAttention


def _tiled() -> BackendCreator:
    from common.engine.attention.tiled import TiledAttention

    return TiledAttention


def _paged() -> BackendCreator:
    from common.engine.attention.paged import PagedAttention

    return PagedAttention.fast


def _paged_exact() -> BackendCreator:
    from common.engine.attention.paged import PagedAttention

    return PagedAttention.exact


def _reference() -> BackendCreator:
    from common.engine.attention.reference import ReferenceAttention

    return ReferenceAttention


_BACKENDS: dict[str, Callable[[], BackendCreator]] = {
    "fast": _fast,
    "tiled": _tiled,
    "paged": _paged,
    "paged_exact": _paged_exact,
    "reference": _reference,
}


def create_attention(name: str, pool: KVPool, num_heads: int) -> AttentionBackend:
    return _BACKENDS[name]()(pool, num_heads)


def create_rows_attention(name: str, pool: KVPool, num_heads: int) -> RowsAttention:
    """For steps of fixed shape beside the backend `name`."""
    if name == "paged":
        from common.engine.attention.paged_rows import PagedRowsAttention

        return PagedRowsAttention(pool, num_heads)
    from common.engine.attention.padded import PaddedAttention

    return PaddedAttention(pool, num_heads)
