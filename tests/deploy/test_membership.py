"""When the manager says that a model awaits the successor of a worker: told by the life of its pools."""

from __future__ import annotations

import pytest

from common.types import Role
from deploy.membership import Membership, ServedModel
from deploy.reconcile import (
    Loss,
    Pool,
    PoolsState,
    RestartPolicy,
    became_drained,
    became_ready,
    close,
    decide,
    lost,
    set_desired,
)

PREFILL, DECODE = Pool("m", Role.PREFILL), Pool("m", Role.DECODE)


class Pools:
    """A manager's state and picture, in steps."""

    def __init__(self, prefill: int = 1, decode: int = 1, *, hands_off: bool = True) -> None:
        self.state = PoolsState({PREFILL: prefill, DECODE: decode})
        self.membership = Membership("test", [ServedModel("m", "/models/m", 7, hands_off=hands_off)])
        self._clock = iter(range(1_000_000))
        self.step()

    def step(self, state: PoolsState | None = None) -> bool:
        """Decides, and tells what is then said of the model."""
        self.state, _ = decide(self.state if state is None else state, next(self._clock))
        return self.said()

    def said(self) -> bool:
        self.membership.publish(self.state)
        return self.membership.snapshot.models[0].awaits_successor

    def ready(self, pool: Pool) -> bool:
        (replica,) = self.state.of(pool)
        return self.step(became_ready(self.state, replica.worker_id, replica.incarnation, next(self._clock)))

    def lose(self, pool: Pool, *, permanent: bool = False) -> bool:
        (replica,) = self.state.of(pool)
        loss = Loss(replica.worker_id, replica.incarnation, "killed", permanent)
        return self.step(lost(self.state, loss, next(self._clock), RestartPolicy()))


@pytest.fixture
def served() -> Pools:
    pools = Pools()
    assert not pools.said()
    assert not pools.ready(PREFILL)
    assert not pools.ready(DECODE)
    return pools


@pytest.mark.parametrize("pool", [PREFILL, DECODE])
def test_from_the_loss_to_the_successor(served: Pools, pool: Pool) -> None:
    (replica,) = served.state.of(pool)
    served.membership.give_up(replica.worker_id, replica.incarnation)  # it is being buried
    assert served.said()
    assert served.lose(pool)
    assert served.step()
    assert not served.ready(pool)


def test_nobody_is_awaited_that_was_never_there() -> None:
    pools = Pools()
    assert not pools.lose(DECODE)
    pools.ready(PREFILL)
    assert not pools.lose(PREFILL)  # its successor helps nobody while there is no decode worker


def test_a_prefill_worker_is_awaited_only_where_decode_workers_compute_no_prompt() -> None:
    pools = Pools(hands_off=False)
    pools.ready(PREFILL)
    pools.ready(DECODE)
    assert not pools.lose(PREFILL)
    assert pools.lose(DECODE)


def test_nobody_is_awaited_where_others_serve() -> None:
    pools = Pools(prefill=0)
    pools.ready(DECODE)
    pools.step(set_desired(pools.state, {DECODE: 2}))
    first, second = pools.state.of(DECODE)
    assert not pools.step(lost(pools.state, Loss(second.worker_id, second.incarnation, "killed"), 1.0, RestartPolicy()))
    assert pools.step(lost(pools.state, Loss(first.worker_id, first.incarnation, "killed"), 1.0, RestartPolicy()))


def test_nobody_is_awaited_who_was_given_up(served: Pools) -> None:
    assert not served.lose(DECODE, permanent=True)


def test_nobody_is_awaited_in_a_pool_that_is_to_be_empty(served: Pools) -> None:
    (replica,) = served.state.of(DECODE)
    assert not served.step(set_desired(served.state, {DECODE: 0}))
    assert not served.step(became_drained(served.state, replica.worker_id, replica.incarnation))
    assert not served.step(set_desired(served.state, {DECODE: 1}))  # the first one of a pool that is new


def test_nobody_is_awaited_at_the_end(served: Pools) -> None:
    assert served.lose(DECODE)
    assert not served.step(close(served.state))
