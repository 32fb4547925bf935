"""Prompts side by side, stepped through a runner by hand: the first step computes the prompts, each other one a token of each."""

from __future__ import annotations

from collections.abc import Sequence

from common.engine.batch import SampleSpec, ScheduledBatch, SequenceSlice
from common.engine.runner import ModelRunner

GREEDY = SampleSpec(position=0, seed=0, choice=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=None)
_BLOCKS_EACH = 8


def generate(runner: ModelRunner, count: int, lengths: Sequence[int]) -> list[list[int]]:
    """Prompts of these lengths, and `count` tokens behind each."""
    tokens = [[5 + place % 50 for place in range(length)] for length in lengths]
    blocks = [list(range(1 + _BLOCKS_EACH * row, 1 + _BLOCKS_EACH * (row + 1))) for row in range(len(tokens))]
    in_kv = [0] * len(tokens)
    for _ in range(count):
        slices = [
            SequenceSlice(known[start:], start, table, (GREEDY,))
            for known, start, table in zip(tokens, in_kv, blocks, strict=True)
        ]
        result = runner.execute(ScheduledBatch(tuple(slices)))
        in_kv = [len(known) for known in tokens]
        for known, drawn in zip(tokens, result.slices, strict=True):
            known.append(drawn.tokens[0].token_id)
    return tokens
