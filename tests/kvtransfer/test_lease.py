from __future__ import annotations

from kvtransfer.lease import PULSES_PER_LEASE, Lease


def test_every_sign_of_life_starts_it_anew() -> None:
    lease = Lease(4.0, 10.0)
    assert lease.ends_s == 14.0
    lease.renew(11.5)
    assert lease.ends_s == 15.5


def test_pulses_may_be_lost_before_a_lease_is() -> None:
    assert PULSES_PER_LEASE >= 3
