"""How evenly tenants that wait are served: Jain's index over what each got, for its weight, while all of them waited.

    1.0   all the same        1/n   one of n got everything

The queue keeps a counter of service per tenant and band (`router.admission.queue`). Looked at once a second; the index is of
those who waited at both ends of the window, for nobody owes service to whoever asks for none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

WINDOW = 30  # looks
_MOST_TENANTS = 1024  # of a band, that are looked at


def jain(shares: Iterable[float]) -> float | None:
    """None for fewer than two, or where nobody got anything."""
    values = list(shares)
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if len(values) > 1 and squares > 0 else None


class FairnessWindow:
    """Of one band of one model."""

    def __init__(self) -> None:
        self._looks: deque[Mapping[str, float]] = deque(maxlen=WINDOW)

    def look(self, counters: Iterable[tuple[str, float]]) -> None:
        """The counters of the tenants that wait now."""
        known = dict(zip(range(_MOST_TENANTS), counters, strict=False))
        self._looks.append(dict(known.values()))

    @property
    def index(self) -> float | None:
        """None while fewer than two have waited for long enough to be compared."""
        if len(self._looks) < 2:
            return None
        first, last = self._looks[0], self._looks[-1]
        return jain(last[name] - first[name] for name in first if name in last)
