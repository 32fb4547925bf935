"""How the rows of a step that decoding leaves are divided among prompts: a pure function.

The prompt whose turn it is gets half of them for certain. The other half goes to shorter prompts first, the shortest at the head;
what those leave is the first one's again, and then the next one's, in turn. So a short prompt does not wait for a long one to be
read, and a long one takes at most twice the steps that it would take alone: in every step, the first in turn gets at least half.
A prompt shorter than the first, with s tokens in front of it in prompts that are shorter still, is read after at most
2 (s + its own) / rows steps.
"""

from __future__ import annotations

from collections.abc import Sequence


def divide(rows: int, lengths: Sequence[int]) -> list[int]:
    """Rows for each prompt, by how many tokens it has left; in order of turns."""
    shares = [0] * len(lengths)
    if not lengths or rows <= 0:
        return shares

    def give(index: int, most: int) -> None:
        nonlocal rows
        count = max(0, min(lengths[index] - shares[index], rows, most))
        shares[index] += count
        rows -= count

    give(0, (rows + 1) // 2)
    for index in sorted((index for index in range(1, len(lengths)) if lengths[index] < lengths[0]), key=lengths.__getitem__):
        give(index, rows)
    for index in range(len(lengths)):
        give(index, rows)
    return shares
