"""How long the two ends of a transfer believe in each other without a sign of life.

Each end says PULSE, several times in a lease, for each transfer that is open on a link, and takes anything that it hears of it as
a sign of life. Silence for `lease_s` ends the transfer with TransferTimeout: the decode side gives up the prompt, the prefill
side stops reading the blocks that it pinned. So what one side holds for the other depends on the other being there, never on
how long it is busy or queued.
"""

from __future__ import annotations

LEASE_S = 4.0
PULSES_PER_LEASE = 4


class Lease:
    def __init__(self, lease_s: float, now_s: float) -> None:
        self._lease_s = lease_s
        self.ends_s = now_s + lease_s

    def renew(self, now_s: float) -> None:
        self.ends_s = now_s + self._lease_s
