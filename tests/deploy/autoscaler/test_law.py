"""The control law against any sequence of views, and its promises one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import AutoscalingConfig
from common.types import Role
from deploy.autoscaler.law import Act, Candidate, Decision, LawState, ModelView, PoolView, decide
from deploy.autoscaler.need import Need


def config_of(**changes: object) -> AutoscalingConfig:
    plain = {
        "mode": "on",
        "prefill": {"min_replicas": 1, "max_replicas": 4},
        "decode": {"min_replicas": 1, "max_replicas": 4},
        "flip_delay_s": 5.0,
        "upscale_delay_s": 10.0,
        "downscale_delay_s": 60.0,
        "cooldown_s": 10.0,
    }
    return AutoscalingConfig.model_validate({**plain, **changes})


def view_of(prefill: int, decode: int, needs: tuple[float, float], **changes: object) -> ModelView:
    def pool(role: Role, size: int, need: float) -> PoolView:
        ready = tuple(Candidate(f"m/{role.value}/{index}", requests=index) for index in range(size))
        return PoolView(size, Need(need, f"{role.value} is asked for {need:.2f}"), ready=ready)

    view = ModelView(pool(Role.PREFILL, prefill, needs[0]), pool(Role.DECODE, decode, needs[1]), requests=1)
    return replace(view, **changes)  # type: ignore[arg-type]


def watch(
    config: AutoscalingConfig, sizes: tuple[int, int], needs: tuple[float, float], seconds: float, **changes: object
) -> tuple[tuple[int, int], list[tuple[float, Decision]]]:
    """What the law does of a need that stays, with every wish fulfilled at once; a look per second."""
    state, found = LawState(since_s=0.0), []
    for now_s in range(int(seconds) + 1):
        state, decision = decide(config, state, view_of(*sizes, needs, **changes), float(now_s))
        if decision.act is not Act.NONE:
            found.append((float(now_s), decision))
            sizes = decision.sizes
    return sizes, found


def test_a_pool_that_is_too_small_first_borrows_an_idle_worker_of_the_other() -> None:
    _, ((at_s, decision), *_) = watch(config_of(), (1, 3), (1.8, 1.2), 30)
    assert (at_s, decision.act, decision.sizes) == (5.0, Act.FLIP, (2, 2))
    assert (decision.worker_id, decision.role) == ("m/decode/0", Role.PREFILL)  # the one with the fewest requests
    assert "prefill is asked for 1.80" in decision.reason
    assert decision.text == "m/decode/0 becomes a prefill worker: 2 prefill, 2 decode"


def test_if_the_other_cannot_spare_one_it_grows_after_its_delay() -> None:
    _, ((at_s, decision), *_) = watch(config_of(), (1, 2), (1.8, 1.2), 30)
    assert (at_s, decision.act, decision.sizes) == (10.0, Act.GROW, (2, 2))


def test_it_grows_to_what_was_needed_all_the_time_but_at_most_doubles() -> None:
    assert watch(config_of(), (2, 1), (3.4, 0.9), 12)[0] == (4, 1)
    assert watch(config_of(), (1, 1), (3.4, 0.9), 12)[0] == (2, 1)


def test_a_peak_shorter_than_the_delay_does_nothing() -> None:
    config, state = config_of(), LawState(since_s=0.0)
    for now_s in range(60):
        need = 3.0 if now_s % 9 < 8 else 0.5  # the flip's delay passes, but the need does not last
        state, decision = decide(config, state, view_of(2, 1, (need, 0.9)), float(now_s))
        assert decision.act is Act.NONE
        assert decision.reason


def test_it_shrinks_by_one_after_a_long_time_and_only_well_below_the_target() -> None:
    sizes, found = watch(config_of(), (3, 1), (1.5, 0.9), 70)
    assert [(at_s, decision.act, decision.sizes) for at_s, decision in found] == [(60.0, Act.SHRINK, (2, 1))]
    assert watch(config_of(), (3, 1), (1.7, 0.9), 1000)[1] == []  # 2 would do, but with no distance to the target
    assert watch(config_of(), sizes, (1.5, 0.9), 1000)[1] == []


def test_with_no_worker_to_add_the_pressures_are_evened_out() -> None:
    config = config_of(max_workers=4)
    _, ((_, decision), *_) = watch(config, (1, 3), (2.5, 2.6), 30)
    assert (decision.act, decision.sizes) == (Act.FLIP, (2, 2))
    assert watch(config, (2, 2), (2.4, 2.5), 300)[1] == []


def test_the_last_worker_of_a_pool_is_never_lent_or_ended_while_the_model_is_awake() -> None:
    asleep_allowed = config_of(prefill={"min_replicas": 0, "max_replicas": 4}, decode={"min_replicas": 0, "max_replicas": 4})
    for config in (config_of(), asleep_allowed):
        for needs in ((0.0, 3.5), (3.5, 0.0), (0.0, 0.0)):
            sizes, _ = watch(config, (2, 2), needs, 1000)
            assert min(sizes) >= 1


def test_it_waits_for_what_is_still_moving() -> None:
    view = view_of(1, 1, (3.0, 0.5))
    moving = replace(view, decode=replace(view.decode, moving="m/decode/1 is draining"))
    state = LawState(since_s=0.0)
    for now_s in range(100):
        state, decision = decide(config_of(), state, moving, float(now_s))
        assert (decision.act, decision.reason) == (Act.NONE, "waits: m/decode/1 is draining")
    state, decision = decide(config_of(), state, view, 100.0)
    assert decision.act is Act.NONE  # the delays begin now


def test_sizes_that_an_operator_set_outside_the_limits_are_brought_back() -> None:
    assert watch(config_of(), (6, 1), (0.0, 0.0), 0)[0] == (4, 1)
    assert watch(config_of(max_workers=3), (3, 3), (0.0, 0.0), 0)[0] == (1, 2)


def test_an_unused_model_sleeps_only_if_it_may_and_wakes_when_somebody_asks() -> None:
    may = config_of(prefill={"min_replicas": 0, "max_replicas": 2}, decode={"min_replicas": 0, "max_replicas": 2}, idle_s=100.0)
    assert watch(config_of(idle_s=100.0), (1, 1), (0.0, 0.0), 300, requests=0, idle_s=500.0)[0] == (1, 1)
    assert watch(may, (1, 1), (0.0, 0.0), 300, requests=0, idle_s=99.0)[0] == (1, 1)
    assert watch(may, (1, 1), (0.0, 0.0), 300, requests=1, idle_s=500.0)[0] == (1, 1)
    sizes, found = watch(may, (1, 1), (0.0, 0.0), 300, requests=0, idle_s=500.0)
    assert (sizes, [decision.act for _, decision in found]) == ((0, 0), [Act.SLEEP])
    sizes, ((at_s, decision),) = watch(may, (0, 0), (0.0, 0.0), 0, demanded=True)
    assert (at_s, decision.act, sizes) == (0.0, Act.WAKE, (1, 1))


needs = st.floats(0.0, 8.0, allow_nan=False)


@given(
    data=st.data(),
    sizes=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    most=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    least=st.sampled_from([(0, 0), (1, 1)]),
    max_workers=st.sampled_from([None, 2, 3, 5]),
)
@settings(max_examples=30, deadline=None)
def test_whatever_it_sees_it_stays_within_its_limits_and_gives_a_reason(
    data: st.DataObject, sizes: tuple[int, int], most: tuple[int, int], least: tuple[int, int], max_workers: int | None
) -> None:
    config = config_of(
        prefill={"min_replicas": least[0], "max_replicas": most[0]},
        decode={"min_replicas": least[1], "max_replicas": most[1]},
        max_workers=max_workers,
        idle_s=30.0,
    )
    state, now_s = LawState(since_s=0.0), 0.0
    within = False
    for _ in range(20):
        view = view_of(*sizes, (data.draw(needs), data.draw(needs)))
        view = replace(
            view,
            requests=data.draw(st.integers(0, 1)),
            idle_s=data.draw(st.sampled_from([0.0, 100.0])),
            demanded=data.draw(st.booleans()),
        )
        state, decision = decide(config, state, view, now_s)
        assert decision.reason
        assert decision.text
        if decision.act is Act.NONE:
            assert decision.sizes == sizes
        elif decision.act is Act.SLEEP:
            assert (decision.sizes, view.requests) == ((0, 0), 0)
        elif decision.act is Act.FLIP:
            assert sum(decision.sizes) == sum(sizes)
            assert min(decision.sizes) >= 1
        sizes = decision.sizes
        if decision.act is not Act.NONE:
            within = True
        if within and sizes != (0, 0):
            assert all(1 <= size <= high for size, high in zip(sizes, most, strict=True))
            assert max_workers is None or sum(sizes) <= max_workers
        now_s += data.draw(st.sampled_from([0.5, 3.0, 20.0, 90.0]))


@given(sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)), load=st.tuples(needs, needs), most=st.sampled_from([None, 4, 6]))
@settings(max_examples=20, deadline=None)
def test_under_a_need_that_stays_it_comes_to_rest(sizes: tuple[int, int], load: tuple[float, float], most: int | None) -> None:
    config = config_of(max_workers=most, downscale_delay_s=20.0)
    settled, _ = watch(config, sizes, load, 250)
    assert watch(config, settled, load, 100)[1] == []


@pytest.mark.parametrize(("needs", "sizes"), [((3.0, 0.5), (2, 1)), ((0.5, 3.0), (1, 2))])
def test_with_three_workers_in_all_they_are_where_the_need_is(needs: tuple[float, float], sizes: tuple[int, int]) -> None:
    for start in ((1, 2), (2, 1)):
        assert watch(config_of(max_workers=3), start, needs, 300)[0] == sizes


def test_after_a_cooldown_a_need_must_have_lasted_like_any_other() -> None:
    config, state = config_of(cooldown_s=20.0), LawState(since_s=0.0)
    sizes, changed_s = (1, 1), []
    for now_s in range(120):
        # Once it has grown, the pools are quiet; just as the cooldown ends there is one look at a peak.
        need = 1.8 if sizes == (1, 1) else 3.0 if changed_s and now_s == changed_s[0] + 20 else 1.5
        state, decision = decide(config, state, view_of(*sizes, (need, 0.9)), float(now_s))
        if decision.act is not Act.NONE:
            changed_s.append(now_s)
            sizes = decision.sizes
    assert (sizes, changed_s) == ((2, 1), [10])
