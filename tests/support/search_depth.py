"""How long property tests search: briefly by default, PDSERVE_SEARCH_TIMES as long on request.

With a factor the examples are new at each run; without one they are the same at every run, so that a failure is no surprise.
"""

from __future__ import annotations

import os

FACTOR = int(os.environ.get("PDSERVE_SEARCH_TIMES", "1"))


def examples(count: int) -> int:
    return count * FACTOR
