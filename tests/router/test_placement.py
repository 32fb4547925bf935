from __future__ import annotations

import pytest

from common.errors import NoWorkerAvailable
from common.types import Request, Role, SamplingParams, WorkerRef, WorkerState
from router.placement import Ledger, Placement, WorkerView, place


def view(name: str, role: Role = Role.DECODE, state: WorkerState = WorkerState.READY, model: str = "m") -> WorkerView:
    return WorkerView(WorkerRef(name, 1, f"{name}:1"), role, model, state, 100)


def request(prompt_tokens: int, max_tokens: int = 10, num_choices: int = 1) -> Request:
    return Request("r", "m", (1,) * prompt_tokens, SamplingParams(max_tokens=max_tokens, seed=0), num_choices)


DECODE = [view("d0"), view("d1")]
PREFILL = [view("p0", Role.PREFILL), view("p1", Role.PREFILL)]


def names(placement: Placement) -> tuple[str, tuple[str, ...]]:
    return placement.decode.worker_id, tuple(ref.worker_id for ref in placement.prefill)


def test_an_idle_pool_is_used_in_turn() -> None:
    ledger = Ledger()
    chosen = []
    for _ in range(4):
        placement = place("m", DECODE + PREFILL, ledger, ())
        chosen.append(names(placement))
        ledger.open(request(5), placement).close()
    assert [decode for decode, _ in chosen] == ["d0", "d1", "d0", "d1"]
    assert [prefill for _, prefill in chosen] == [("p0", "p1"), ("p1", "p0")] * 2


def test_the_least_outstanding_tokens_win() -> None:
    ledger = Ledger()
    long = ledger.open(request(100), place("m", DECODE + PREFILL, ledger, ()))
    for _ in range(3):
        placement = place("m", DECODE + PREFILL, ledger, ())
        assert names(placement) == ("d1", ("p1", "p0"))
        ledger.open(request(5), placement)
    long.prefilled()
    assert names(place("m", DECODE + PREFILL, ledger, ())) == ("d1", ("p0", "p1"))
    long.close()
    assert names(place("m", DECODE + PREFILL, ledger, ())) == ("d0", ("p0", "p1"))


def test_every_choice_is_charged_but_not_the_whole_context() -> None:
    ledger = Ledger()
    placement = Placement(DECODE[0].ref, ())
    ledger.open(request(10, max_tokens=20, num_choices=3), placement)
    assert ledger.tokens[DECODE[0].ref] == 10 + 60
    ledger.open(request(10, max_tokens=1_000_000), placement)
    assert ledger.tokens[DECODE[0].ref] < 2_000


def test_closing_is_idempotent_and_leaves_nothing() -> None:
    ledger = Ledger()
    entry = ledger.open(request(5), place("m", DECODE + PREFILL, ledger, ()))
    entry.prefilled()
    entry.prefilled()
    entry.close()
    entry.close()
    assert not any(ledger.tokens.values())


def test_workers_to_avoid_come_last_but_still_serve() -> None:
    avoid = {DECODE[0].ref, PREFILL[0].ref}
    assert names(place("m", DECODE + PREFILL, Ledger(), avoid)) == ("d1", ("p1", "p0"))
    assert names(place("m", DECODE[:1] + PREFILL, Ledger(), avoid)) == ("d0", ("p1", "p0"))


def test_only_ready_workers_of_the_model_and_role_count() -> None:
    others = [view("x", state=state) for state in WorkerState if state is not WorkerState.READY]
    others += [view("y", model="other"), view("p", Role.PREFILL)]
    with pytest.raises(NoWorkerAvailable) as raised:
        place("m", others, Ledger(), ())
    assert raised.value.retry_after_s
    assert names(place("m", [*others, DECODE[0]], Ledger(), ())) == ("d0", ("p",))


def test_absent_workers_are_forgotten_once_nothing_is_in_flight() -> None:
    ledger = Ledger()
    entry = ledger.open(request(5), Placement(DECODE[0].ref, ()))
    ledger.forget_absent(())
    assert ledger.tokens[DECODE[0].ref]
    entry.close()
    ledger.forget_absent(())
    assert not ledger.dispatches
    assert not ledger.tokens
