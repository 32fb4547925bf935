"""How urgent a request is. Bands are strict: what is queued in a higher one goes first."""

from __future__ import annotations

import enum


class Band(enum.StrEnum):
    """From the most urgent to the least."""

    INTERACTIVE = "interactive"
    BATCH = "batch"
    BACKGROUND = "background"

    @property
    def rank(self) -> int:
        """0 = the most urgent."""
        return list(Band).index(self)
