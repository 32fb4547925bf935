"""Guesses by heads on the model's own last hidden row (`common.engine.heads`): no model beside it, no KV, no state.

All that a guess needs of a sequence comes with the question: the row that its last token was drawn from, and that token. So it is
the same after a hand-off, which carries the row, and wherever a sequence goes on. Evidence is how sure the heads are.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.engine.heads.heads import DraftHeads
from decode_worker.speculation.proposer import ChoiceKey, Guess, Wanted

_CLASSES = 5  # of certainty, equally wide


class MedusaProposer:
    name = "medusa"
    takes_time = True
    reads_rows = True

    def __init__(self, heads: DraftHeads) -> None:
        self._heads = heads

    def propose(self, wanted: Sequence[Wanted]) -> list[Guess]:
        guesses = [Guess()] * len(wanted)
        asked = [
            (place, item, item.row)
            for place, item in enumerate(wanted)
            if item.row is not None and item.most_tokens > 0 and self._heads.fits(item.row)
        ]
        if not asked:
            return guesses
        count = min(self._heads.num_guesses, max(item.most_tokens for _, item, _ in asked))
        named, sure = self._heads.guess([row for _, _, row in asked], [item.tokens[-1] for _, item, _ in asked], count)
        for (place, item, _), token_ids, certainty in zip(asked, named, sure, strict=True):
            evidence = min(_CLASSES - 1, int(certainty * _CLASSES))
            guesses[place] = Guess(tuple(token_ids[: item.most_tokens]), evidence)
        return guesses

    def end(self, key: ChoiceKey, salt: str, tokens: Sequence[int], num_prompt_tokens: int) -> None:
        """Nothing was kept."""
