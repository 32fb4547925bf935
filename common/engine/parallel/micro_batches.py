"""A step cut into parts that follow each other through the stages of a pipeline.

    stage 0   | a | b | c |                  a step of three parts takes four turns instead of two whole steps
    stage 1       | a | b | c |

Rows stay in their order. A chunk of a prompt may be cut too: when a stage comes to its second part, that stage has the keys and
values of the first one. Only what a part may not be is small: each part reads all weights.
"""

from __future__ import annotations

from dataclasses import replace

from common.engine.batch import ScheduledBatch, SequenceSlice

_PER_STAGE = 2


def num_micro_batches(num_tokens: int, num_stages: int, least_tokens: int) -> int:
    """Twice as many as stages leave a fifth of a long step's time idle with two stages; fewer where parts would be too small."""
    if num_stages == 1:
        return 1
    return max(1, min(_PER_STAGE * num_stages, num_tokens // least_tokens))


def cut(batch: ScheduledBatch, parts: int) -> list[ScheduledBatch]:
    """Consecutive parts of equal numbers of rows, but for one row. Samples are dropped: they belong to the whole."""
    num_rows = batch.num_tokens
    ends = [num_rows * (part + 1) // parts for part in range(parts)]
    found: list[ScheduledBatch] = []
    slices: list[SequenceSlice] = []
    row = 0
    for item in batch.slices:
        first = 0
        while first < len(item.token_ids):
            count = min(len(item.token_ids) - first, ends[len(found)] - row)
            tokens = item.token_ids[first : first + count]
            slices.append(replace(item, token_ids=tokens, start=item.start + first, samples=(), num_drafts=0))
            first += count
            row += count
            if row == ends[len(found)]:
                found.append(ScheduledBatch(tuple(slices)))
                slices = []
    return found
