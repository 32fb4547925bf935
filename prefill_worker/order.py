"""In which order prompts are offered a place in the next step.

By band, in a band those first that have the fewest tokens left, then by arrival: a short prompt does not wait behind a long one,
and what was begun is finished before the like of it is begun. So that this starves nobody, every so many steps at the latest the
oldest prompt goes first, whatever its band and length.

What follows, while the pool has room and `every` is not 1:
  - the most urgent prompt waits for the step under way and at most one more, which begins with a chunk of the oldest;
  - a prompt is computed after at most `every` times as many steps as it and all that came before it have chunks.
Where the pool has no room for whoever goes first, nobody behind it gets any, so in its turn the oldest gets what others give up.
"""

from __future__ import annotations

from collections.abc import Collection

from prefill_worker.prompt import Prompt


class TurnOrder:
    def __init__(self, every: int) -> None:
        self._every = every
        self._oldest: int | None = None  # the serial number of the oldest prompt there is
        self._steps_without = 0  # that went by without a chunk of it

    def of(self, prompts: Collection[Prompt]) -> list[Prompt]:
        """`prompts` are all that could be computed."""
        ordered = sorted(prompts, key=lambda prompt: (prompt.request.priority, prompt.tokens_left, prompt.serial))
        if not ordered:
            return ordered
        oldest = min(ordered, key=lambda prompt: prompt.serial)
        if oldest.serial != self._oldest:
            self._oldest, self._steps_without = oldest.serial, 0
        if self._steps_without >= self._every - 1:
            ordered.remove(oldest)
            ordered.insert(0, oldest)
        return ordered

    def planned(self, chosen: Collection[Prompt]) -> None:
        """Who is in the step that comes next; nobody is none."""
        if chosen:
            with_oldest = any(prompt.serial == self._oldest for prompt in chosen)
            self._steps_without = 0 if with_oldest else self._steps_without + 1
