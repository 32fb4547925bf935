"""What it costs to get a preempted answer's KV back: computing it again, or copying it out and in. Measured as it goes.

Computing again takes rows, and rows of prompts take what steps that had many of them took; before there were such, what rows of
any steps took. Copying takes bytes, there and back, at the pace of the copies so far. Both figures are means in which what is
older counts less.
"""

from __future__ import annotations

_KEPT = 0.9  # of what was known, at each observation
_PROMPT_ROWS = 8  # from so many on a step says what rows of prompts cost


class PreemptionCost:
    def __init__(self, block_bytes: int, bytes_per_s: float) -> None:
        """`bytes_per_s` as measured before anything was copied in earnest."""
        self._block_bytes = block_bytes
        self._s_per_byte = 1.0 / bytes_per_s
        self._prompt_row_s: float | None = None
        self._any_row_s: float | None = None

    def observe_step(self, rows: int, prefill_rows: int, seconds: float) -> None:
        row_s = seconds / max(1, rows)
        if prefill_rows >= _PROMPT_ROWS:
            self._prompt_row_s = _mean(self._prompt_row_s, row_s)
        else:
            self._any_row_s = _mean(self._any_row_s, row_s)

    def observe_copies(self, num_bytes: int, seconds: float) -> None:
        if num_bytes:
            self._s_per_byte = _mean(self._s_per_byte, seconds / num_bytes)

    def recompute_s(self, num_tokens: int) -> float:
        row_s = self._prompt_row_s if self._prompt_row_s is not None else self._any_row_s
        return num_tokens * (row_s or 0.0)

    def swap_s(self, num_blocks: int) -> float:
        return 2 * num_blocks * self._block_bytes * self._s_per_byte


def _mean(known: float | None, new: float) -> float:
    return new if known is None else _KEPT * known + (1 - _KEPT) * new
