"""What the cache did for a call: for headers, metrics and the account of time. Written by `router.cache.answers`."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


class CacheResult(enum.StrEnum):
    """In order: of a call with several prompts, the last that applies to one of them."""

    HIT_EXACT = "hit-exact"
    HIT_SEMANTIC = "hit-semantic"
    COALESCED = "coalesced"
    MISS = "miss"
    INELIGIBLE = "ineligible"
    BYPASS = "bypass"

    @property
    def hit(self) -> bool:
        return self in (CacheResult.HIT_EXACT, CacheResult.HIT_SEMANTIC)


_ORDER = {result: rank for rank, result in enumerate(CacheResult)}


@dataclass(slots=True)
class CacheReport:
    """Of one request. `result` is None until its first tokens are there."""

    result: CacheResult | None = None
    reason: str = ""  # for metrics: few and fixed words
    answer_id: str = ""  # of the answer in the store
    age_s: float | None = None
    score: float | None = None


def result_of(reports: Sequence[CacheReport]) -> CacheResult | None:
    """Of a whole call; None if nothing was answered."""
    results = [report.result for report in reports if report.result is not None]
    return max(results, key=_ORDER.__getitem__, default=None)


def headers_of(reports: Sequence[CacheReport]) -> dict[str, str]:
    """Of a whole call; empty if nothing was answered."""
    result = result_of(reports)
    if result is None:
        return {}
    headers = {"x-cache": str(result)}
    if len(reports) == 1 and reports[0].answer_id:
        headers["x-cache-id"] = reports[0].answer_id
    if len(reports) == 1 and reports[0].score is not None:
        headers["x-cache-score"] = f"{reports[0].score:.4f}"
    if result.hit:
        headers["Age"] = str(int(max(report.age_s or 0.0 for report in reports)))
    return headers
