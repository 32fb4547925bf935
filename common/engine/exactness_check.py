"""Shows, when an engine starts in exact mode, that exact mode holds on this machine, with this model and this library.

No library promises that a fixed shape means a fixed order of summation; it is measured. So a short sequence is computed twice,
at once and in pieces beside a neighbour, and logits and KV are compared bit by bit. An engine that fails does not start.
"""

from __future__ import annotations

import itertools

import torch

from common.blocks import num_blocks
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.block_manager import BlockManager
from common.engine.kv_pool import KVPool
from common.engine.runner import ModelRunner
from common.errors import ConfigError

_CHECKED_TOKENS = 80  # more than one KV tile, more than one GEMM tile


def check_exactness(runner: ModelRunner, pool: KVPool, blocks: BlockManager, vocab_size: int, max_model_tokens: int) -> None:
    """Called once, before the engine serves; borrows blocks and gives them back. Raises ConfigError."""
    count = min(_CHECKED_TOKENS, max_model_tokens, (blocks.num_available - 1) // 2 * blocks.block_tokens)
    if count < 2:
        return  # a pool for one sequence of one token at a time has nothing to compare with
    token_ids = torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    needed = num_blocks(count, blocks.block_tokens)
    borrowed = blocks.allocate(2 * needed + 1)
    whole, pieces, neighbour = borrowed[:needed], borrowed[needed:-1], borrowed[-1:]
    expected = runner.compute_logits(ScheduledBatch((SequenceSlice(token_ids, 0, whole),)))[0]
    beside = SequenceSlice(token_ids[-1:], 0, neighbour)
    cuts = (0, count // 3, count - 1, count)
    for start, end in itertools.pairwise(cuts):
        if start < end:
            got = runner.compute_logits(ScheduledBatch((beside, SequenceSlice(token_ids[start:end], start, pieces))))[1]
    holds = torch.equal(expected, got) and torch.equal(pool.tensor[whole], pool.tensor[pieces])
    blocks.release(borrowed)
    if not holds:
        raise ConfigError(
            "exact mode does not hold on this machine: its matrix library gives a row other bits when others share the call",
            param="engine.exact",
        )
