"""How free an answer is to differ from the one before: what decides whether it may be given twice."""

from __future__ import annotations

import enum


class SamplingClass(enum.StrEnum):
    """Written by `router.validate` from what the client wrote, since defaults look like choices afterwards."""

    GREEDY = "greedy"  # temperature 0: one answer
    SEEDED = "seeded"  # an explicit seed: one answer per seed
    UNSET = "unset"  # neither temperature nor seed given
    SAMPLED = "sampled"  # a temperature and no seed: the client wants to see variety

    @property
    def repeatable(self) -> bool:
        """Whether the model itself would give the same answer again."""
        return self in (SamplingClass.GREEDY, SamplingClass.SEEDED)
