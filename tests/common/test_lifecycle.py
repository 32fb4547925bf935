"""Phases move along the table and nowhere else; stamps are last entries; the stages of a waterfall add up."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.clock import ManualClock
from common.errors import IllegalTransition
from common.lifecycle import TERMINAL, Lifecycle, Phase, Waterfall
from common.types import StageTimings

# The roads through the drawing, written down once more; every legal move lies on one of them.
ROADS = [
    "RECEIVED QUEUED RESERVED PREFILLING VERIFIED DECODING FINISHED",
    "RECEIVED QUEUED RESERVED PREFILLING DECODING FINISHED",
    "RECEIVED QUEUED RESERVED QUEUED RESERVED PREFILLING QUEUED RESERVED PREFILLING VERIFIED DECODING FINISHED",
]
ALIVE = {phase for phase in Phase if phase.name not in ("FINISHED", "FAILED", "CANCELLED")}


def phases(road: str) -> list[Phase]:
    return [Phase[name] for name in road.split()]


def legal_moves() -> set[tuple[Phase, Phase]]:
    moves = {move for road in ROADS for move in itertools.pairwise(phases(road))}
    return moves | {(phase, end) for phase in ALIVE for end in (Phase.FAILED, Phase.CANCELLED)}


def brought_to(phase: Phase) -> Lifecycle:
    life = Lifecycle(ManualClock())
    road = next((road for road in map(phases, ROADS) if phase in road), [Phase.RECEIVED, phase])
    for step in road[1 : road.index(phase) + 1]:
        life.enter(step)
    return life


@pytest.mark.parametrize("start", Phase)
def test_exactly_the_drawn_moves_are_legal(start: Phase) -> None:
    for end in Phase:
        life = brought_to(start)
        if (start, end) in legal_moves():
            life.enter(end)
            assert life.phase is end
            assert life.ended == (end not in ALIVE)
        else:
            with pytest.raises(IllegalTransition, match=f"{start.name} -> {end.name}"):
                life.enter(end)
            assert life.phase is start


def test_the_ends_are_the_terminal_phases() -> None:
    assert set(Phase) - ALIVE == TERMINAL


def test_a_stamp_is_the_last_entry() -> None:
    clock = ManualClock(100.0)
    life = Lifecycle(clock)
    for phase in phases(ROADS[2])[1:]:  # 11 moves, one a second; QUEUED for the last time after the sixth
        clock.advance(1.0)
        life.enter(phase)
    assert life.between_s(Phase.RECEIVED, Phase.QUEUED) == 6.0
    assert life.between_s(Phase.QUEUED, Phase.DECODING) == 4.0
    assert life.between_s(Phase.RECEIVED, Phase.FINISHED) == 11.0
    assert life.between_s(Phase.RECEIVED, Phase.CANCELLED) == 0.0


def test_an_illegal_move_leaves_no_stamp() -> None:
    life = Lifecycle(ManualClock())
    with pytest.raises(IllegalTransition):
        life.enter(Phase.DECODING)
    assert set(life.stamps_s) == {Phase.RECEIVED}


seconds = st.integers(0, 10_000).map(lambda milliseconds: milliseconds / 1024)  # exact in binary: sums may be compared
SUMMED = ("decode_queue_s", "prefill_queue_s", "prefill_s", "transfer_exposed_s", "rpc_s", "activate_s")


@given(router_s=seconds, network_s=seconds, parts=st.tuples(*[seconds] * len(SUMMED)), hidden_s=seconds)
def test_the_stages_of_a_waterfall_add_up_to_its_ttft(router_s, network_s, parts, hidden_s) -> None:
    worker = StageTimings(**dict(zip(SUMMED, parts, strict=True)), transfer_hidden_s=hidden_s)
    ttft_s = router_s + network_s + sum(parts)
    waterfall = Waterfall(router_s=router_s, ttft_s=ttft_s, total_s=ttft_s + 9, num_output_tokens=4, worker=worker)
    assert sum(value for _, value in waterfall.stages()) == ttft_s
    assert waterfall.network_s == network_s
    assert waterfall.tpot_s == 3.0
    assert dataclasses.replace(waterfall, num_output_tokens=1).tpot_s == 0.0


def test_every_duration_of_the_worker_is_in_the_sum_except_the_hidden_one() -> None:
    durations = {field.name for field in dataclasses.fields(StageTimings) if field.name.endswith("_s")}
    assert durations == {*SUMMED, "transfer_hidden_s"}
    for name in SUMMED:
        assert StageTimings(**{name: 2.0}).total_s == 2.0
