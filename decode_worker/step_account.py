"""What a step's time was for, row by row: prompts, tokens that came, guesses that were wrong, rows for answers that had ended.

    a step is accounted for: of(totals, rows, seconds) -> prompt, decoded, surplus for each share of it -> close

A row costs an equal part of the step. What a request's rows cost is entered into its own account (`WorkAccount`) at once, so the
accounts of all requests and the surplus add up to the time of all steps.
"""

from __future__ import annotations

from common.engine.core import SchedulerTotals
from decode_worker.generation import Generation
from decode_worker.step_plan import Share


class StepAccount:
    def __init__(self, totals: SchedulerTotals, *, rows: int, seconds: float) -> None:
        self._totals = totals
        self._rows = rows
        self._seconds = seconds
        self._row_s = seconds / max(1, rows)
        self._prompt_rows = self._surplus_rows = 0
        self._wrong_before = totals.drafted_tokens - totals.accepted_tokens

    @property
    def prompt_rows(self) -> int:
        return self._prompt_rows

    def prompt(self, generation: Generation, share: Share, *, drew: bool) -> None:
        """A share of prompt tokens, or of tokens that are computed again; the row that a further token was drawn from is not one
        of these."""
        if share.count == 1 and generation.prompt_in_kv:
            return
        rows = share.count - (generation.prompt_in_kv and drew)
        self._prompt_rows += rows
        generation.work.prefill_s += rows * self._row_s
        generation.work.prefill_tokens += rows

    def decoded(self, generation: Generation, share: Share, num_right: int, author: str) -> None:
        """A share that tokens were drawn from; `num_right` of its guesses are now in the sequence."""
        generation.work.decode_s += (1 + num_right) * self._row_s
        if share.num_drafts:
            self._totals.drafted(share.num_drafts, num_right, author)
            generation.work.wasted_s += (share.num_drafts - num_right) * self._row_s
            generation.work.wasted_tokens += share.num_drafts - num_right

    def surplus(self, share: Share) -> None:
        """A share of an answer that has ended since the step was planned."""
        self._surplus_rows += share.count + share.num_drafts

    def close(self) -> None:
        self._totals.surplus_rows += self._surplus_rows
        wrong = self._totals.drafted_tokens - self._totals.accepted_tokens - self._wrong_before
        self._totals.step_done(
            self._seconds, rows=self._rows, prefill_rows=self._prompt_rows, wasted_rows=wrong + self._surplus_rows
        )
