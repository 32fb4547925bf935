"""Decisions: where prompts go, by what is known. Prompts are as long as 16-token blocks make them."""

from __future__ import annotations

import random

import pytest

from common.blocks import block_key, hash_chain, root_hash
from common.clock import ManualClock
from common.config import PlacementConfig
from common.errors import NoWorkerAvailable
from common.load import StepSample, WorkerLoad, WorkerReport, WorkerShape, pairs
from common.types import PrefillChoice, Request, Role, SamplingParams, StageTimings, Started, WorkerRef, WorkerState
from router.placement.membership import Placement, Prompt, WorkerView
from router.placement.placer import Placer
from router.placement.predicted import decode_options

A, B, C = 0.004, 1e-4, 1e-9


def ref(name: str, incarnation: int = 1) -> WorkerRef:
    return WorkerRef(name, incarnation, f"{name}:1")


def view(name: str, state: WorkerState = WorkerState.READY, model: str = "m", incarnation: int = 1) -> WorkerView:
    return WorkerView(ref(name, incarnation), Role.DECODE if name[0] == "d" else Role.PREFILL, model, state, 100)


DECODE, PREFILL = [view("d0"), view("d1")], [view("p0"), view("p1")]
ALL = (*DECODE, *PREFILL)


class Rig:
    """A placer and the workers that report to it."""

    def __init__(
        self, *views: WorkerView, policy: str = "predicted", externality: float = 0.7, prefill_block_tokens: int = 16
    ) -> None:
        self.prefill_block_tokens = prefill_block_tokens
        self.clock = ManualClock(100.0)
        config = PlacementConfig.model_validate({"policy": policy, "externality": externality})
        self.placer = Placer(config, clock=self.clock, draw=random.Random(1))
        self.views = views
        self.sequences: dict[WorkerRef, int] = {}
        self.placer.sync(views)

    def shape(self, name: str, local_prefill: str = "auto") -> WorkerShape:
        longer = name[0] == "p" and self.prefill_block_tokens != 16
        return WorkerShape(self.prefill_block_tokens if longer else 16, (b"g" if longer else b"f") * 32, 1000, 256, local_prefill)

    def report(
        self,
        name: str,
        *,
        registered: tuple[int, ...] = (),
        evicted: tuple[int, ...] = (),
        local_prefill: str = "auto",
        dispatches: tuple[int, ...] = (),
        steps: tuple[StepSample, ...] = (),
        **load: float,
    ) -> bool:
        to = ref(name)
        sequence = self.sequences[to] = self.sequences.get(to, 0) + 1
        load.setdefault("blocks_free", 1000)
        report = WorkerReport(
            sequence=sequence,
            load=WorkerLoad(**load),  # type: ignore[arg-type]
            shape=self.shape(name, local_prefill) if sequence == 1 else None,
            dispatches=dispatches,
            registered=registered,
            evicted=evicted,
            steps=steps,
        )
        return self.placer.report(to, report)

    def learn(self, *, handoff_s: float = 0.01, speed: float = 1.0, **all_load: str) -> None:
        """Everybody has computed for a while, and hand-offs were seen."""
        for one in self.views:
            sizes = [16, 64, 200, 1, 128, 32, 250, 8] * 6
            steps = tuple(StepSample(n, pairs(n, 3 * n), (A + B * n + C * pairs(n, 3 * n)) / speed) for n in sizes)
            self.report(one.ref.worker_id, steps=steps, **all_load)  # type: ignore[arg-type]
        for tokens in (64, 512, 2048) * 5:
            self.placer.fleet.handoff("m").learn(tokens, handoff_s + 1e-6 * tokens)

    def place(self, tokens: int = 64, keys: tuple[int, ...] = (), avoid: frozenset[WorkerRef] = frozenset()) -> Placement:
        return self.placer.place("m", Prompt(tokens, 50, 1, 16, keys), avoid)

    def send(self, tokens: int = 64, keys: tuple[int, ...] = ()) -> tuple[str, str, object]:
        prompt = Prompt(tokens, 50, 1, 16, keys)
        placement = self.placer.place("m", prompt)
        return placement.decode.worker_id, placement.prefill[0].worker_id, self.placer.open(placement, "m", prompt)


def names(placement: Placement) -> tuple[str, tuple[str, ...]]:
    return placement.decode.worker_id, tuple(one.worker_id for one in placement.prefill)


@pytest.mark.parametrize("policy", ["predicted", "least_load", "round_robin", "min_ttft"])
def test_an_idle_pool_is_used_in_turn(policy: str) -> None:
    rig = Rig(*ALL, policy=policy)
    chosen = []
    for _ in range(4):
        decode, prefill, dispatched = rig.send()
        chosen.append((decode, prefill))
        dispatched.close()  # type: ignore[attr-defined]
        rig.clock.advance(1.0)
    assert chosen == [("d0", "p0"), ("d1", "p1")] * 2


@pytest.mark.parametrize("policy", ["predicted", "least_load", "dynamo", "weighted", "cache_aware", "loadaware", "aibrix"])
def test_a_long_prompt_in_flight_sends_others_elsewhere(policy: str) -> None:
    """Without reports: what was sent is what is known."""
    rig = Rig(*ALL, policy=policy)
    *first, long = rig.send(5000)
    assert first == ["d0", "p0"]
    assert rig.send()[:2] == ("d1", "p1")
    long.close()  # type: ignore[attr-defined]
    rig.clock.advance(10.0)
    assert rig.send()[:2] == ("d0", "p0")


def test_workers_to_avoid_come_last_but_still_serve() -> None:
    avoid = frozenset({ref("d0"), ref("p0")})
    assert names(Rig(*ALL).place(avoid=avoid)) == ("d1", ("p1", "p0"))
    assert names(Rig(DECODE[0], *PREFILL).place(avoid=avoid)) == ("d0", ("p1", "p0"))
    assert names(Rig(*ALL, policy="least_load").place(avoid=avoid)) == ("d1", ("p1", "p0"))


def test_only_ready_workers_of_the_model_count() -> None:
    others = [view(f"d{state.value}", state) for state in WorkerState if state is not WorkerState.READY]
    rig = Rig(*others, view("dx", model="other"), *PREFILL)
    with pytest.raises(NoWorkerAvailable) as raised:
        rig.place()
    assert raised.value.retry_after_s
    rig.placer.sync((*others, DECODE[0]))
    assert names(rig.place()) == ("d0", ())


def test_a_worker_that_is_gone_is_forgotten_once_nothing_is_in_flight() -> None:
    rig = Rig(*ALL)
    *_, dispatched = rig.send()
    rig.placer.sync(())
    assert set(rig.placer.fleet.workers) == {ref("d0"), ref("p0")}
    dispatched.close()  # type: ignore[attr-defined]
    dispatched.close()  # type: ignore[attr-defined]
    assert not rig.placer.fleet.workers


def test_a_prompt_is_named_as_workers_name_it() -> None:
    rig = Rig(*ALL)
    tokens = tuple(range(3, 40))
    request = Request("r", "m", tokens, SamplingParams(max_tokens=5, seed=0), cache_salt="tenant")
    assert rig.placer.prompt_of(request).keys == ()
    rig.report("p0")
    prompt = rig.placer.prompt_of(request)
    root = root_hash(b"f" * 32, "tenant")
    assert prompt.keys == tuple(block_key(one) for one in hash_chain(root, tokens, 16))
    assert (len(prompt.keys), prompt.block_tokens, prompt.num_tokens) == (2, 16, 37)
    whole = Request("r", "m", tokens, SamplingParams(max_tokens=5, seed=0, prompt_logprobs=1))
    assert rig.placer.prompt_of(whole).keys == ()


def test_pools_whose_blocks_differ_name_a_prompt_each_for_itself() -> None:
    rig = Rig(*ALL, prefill_block_tokens=64)
    rig.learn(local_prefill="never")
    tokens = tuple(range(3, 3 + 1030))
    prompt = rig.placer.prompt_of(Request("r", "m", tokens, SamplingParams(max_tokens=5, seed=0)))
    here, there = prompt.at(Role.DECODE), prompt.at(Role.PREFILL)
    assert (here.block_tokens, len(here.keys)) == (16, 64)
    assert there.keys == tuple(block_key(one) for one in hash_chain(root_hash(b"g" * 32, ""), tokens, 64))
    rig.report("d1", registered=tuple(here.keys[:60]))
    rig.report("p1", registered=tuple(there.keys[:8]))
    placement = rig.placer.place("m", prompt)
    assert (placement.decode.worker_id, placement.decode_cached_tokens) == ("d1", 960)
    assert (placement.prefill[0].worker_id, placement.prefill_cached_tokens) == ("p1", 512)
    rig.placer.open(placement, "m", prompt).close()
    again = rig.placer.place("m", prompt)
    assert (again.decode_cached_tokens, again.prefill_cached_tokens) == (1024, 1024), "promised to both, by their own names"
    equal = Rig(*ALL)
    equal.learn()
    assert equal.placer.prompt_of(Request("r", "m", tokens, SamplingParams(max_tokens=5, seed=0))).elsewhere is None


def test_the_holder_of_a_prefix_is_worth_some_wait_but_not_any() -> None:
    rig = Rig(*ALL)
    rig.learn()
    keys = tuple(range(1, 65))  # 1,024 tokens: a tenth of a second to compute
    rig.report("p1", registered=keys)
    assert names(rig.place(1024, keys))[1][0] == "p1"
    rig.report("p1", queued_tokens=500)
    assert names(rig.place(1024, keys))[1][0] == "p1"
    rig.report("p1", queued_tokens=5000)
    assert names(rig.place(1024, keys))[1][0] == "p0"
    rig.report("p1", evicted=keys)
    rig.report("p0", queued_tokens=100)
    assert names(rig.place(1024, keys))[1][0] == "p1"


def test_where_prompts_are_computed_in_no_time_they_still_go_to_who_holds_them() -> None:
    """Costs are as good as equal; copies of a prefix on every worker would still take the place of others."""
    rig = Rig(*ALL)
    rig.learn(speed=100.0)
    keys = tuple(range(1, 17))  # 256 tokens: a quarter of a millisecond
    for name in ("p1", "d1"):
        rig.report(name, registered=keys)
    for _ in range(2):  # the holders were used last
        rig.send()[2].close()  # type: ignore[attr-defined]
    decode, (prefill, *_) = names(rig.place(300, keys))
    assert (decode, prefill) == ("d1", "p1")
    rig.report("p1", queued_tokens=5000)
    assert names(rig.place(300, keys))[1][0] == "p0"


def test_a_dispatch_counts_as_a_prefix_until_it_is_known_or_too_old() -> None:
    rig = Rig(*ALL)
    rig.learn()
    keys = tuple(range(1, 65))
    *_, dispatched = rig.send(1024, keys)
    dispatched.close()  # type: ignore[attr-defined]
    rig.clock.advance(2.0)
    assert rig.place(1030, keys).decode_cached_tokens == 1024
    rig.clock.advance(60.0)
    assert rig.place(1030, keys).decode_cached_tokens == 0


def test_who_follows_a_prompt_on_its_way_is_told_to_wait_for_it() -> None:
    """The beginning is on its way to d0 from a prefill worker that is busy for seconds: it can be found by name, but not yet."""
    rig = Rig(view("d0"), view("p0"))
    rig.learn()
    keys, load = tuple(range(1, 65)), {"decoding": 60, "running": 60, "kv_tokens": 60_000}
    rig.report("p0", queued_tokens=30_000)
    rig.report("d0", **load)
    *_, dispatched = rig.send(1024, keys)
    first_s = dispatched.placement.ttft_s  # type: ignore[attr-defined]
    assert dispatched.placement.choice is PrefillChoice.THERE  # type: ignore[attr-defined]
    placer, prompt = rig.placer, Prompt(1025, 50, 1, 16, keys)
    matches = placer.fleet.index.match(keys, rig.clock.monotonic_s())

    def here_s() -> float:
        found = decode_options(
            placer.fleet.pool("m", Role.DECODE),
            prompt,
            matches,
            placer.fleet.index,
            placer.fleet.handoff("m"),
            rig.clock.monotonic_s(),
            externality=0.7,
            avoid=(),
        )
        assert found is not None
        return found[1].ttft_s

    assert here_s() > first_s
    before_s = here_s()
    rig.clock.advance(1.0)
    assert here_s() == pytest.approx(before_s - 1.0)
    rig.report("d0", registered=keys, **load)
    assert here_s() < first_s / 10, "it is there"


def test_the_work_spared_for_others_counts_when_the_pool_is_busy() -> None:
    """One holder waits longer than computing it anew elsewhere would take; worth it only for the sake of the others."""
    for externality, expected in ((0.0, "p0"), (1.0, "p1")):
        rig = Rig(*DECODE, *PREFILL, view("p2"), view("p3"), externality=externality)
        rig.learn()
        keys = tuple(range(1, 65))
        rig.report("p1", registered=keys, queued_tokens=2500)
        for name, queued in (("p0", 1200), ("p2", 1300), ("p3", 1300)):
            rig.report(name, queued_tokens=queued)
        assert names(rig.place(1024, keys))[1][0] == expected


@pytest.mark.parametrize(
    ("load", "tokens", "handoff_s", "choice"),
    [
        ({}, 20, 0.05, PrefillChoice.HERE),
        ({}, 2000, 0.05, PrefillChoice.HERE),  # nobody decodes: nobody is held up
        ({"decoding": 30, "running": 30, "kv_tokens": 3000}, 2000, 0.05, PrefillChoice.THERE),
        ({"decoding": 30, "running": 30, "kv_tokens": 3000}, 4, 0.05, PrefillChoice.HERE),
        ({}, 20, 0.0001, PrefillChoice.THERE),
    ],
)
def test_where_it_is_computed_is_what_costs_less(
    load: dict[str, float], tokens: int, handoff_s: float, choice: PrefillChoice
) -> None:
    rig = Rig(*ALL)
    rig.learn(handoff_s=handoff_s)
    if choice is PrefillChoice.THERE and not load:
        for name in ("d0", "d1"):
            rig.report(name, queued_tokens=500, queued_pairs=1e5, running=1)
    for name in ("d0", "d1"):
        if load:
            rig.report(name, **load)
    assert rig.place(tokens).choice is choice


def test_without_a_forecast_the_worker_decides() -> None:
    rig = Rig(*ALL)
    assert (rig.place(20).choice, rig.place(20).ttft_s) == (PrefillChoice.WORKER, None)
    rig.learn()
    placement = rig.place(20)
    assert placement.choice is not PrefillChoice.WORKER
    assert placement.ttft_s is not None
    for name in ("d0", "d1"):
        rig.placer.break_off(ref(name))
    assert rig.place(20).ttft_s is not None, "what was learnt stays"


def test_what_a_worker_is_configured_never_to_do_is_not_asked_of_it() -> None:
    rig = Rig(*ALL)
    rig.learn(handoff_s=5.0, local_prefill="never")
    assert rig.place(20).choice is PrefillChoice.THERE


def test_without_prefill_workers_there_is_no_choice() -> None:
    rig = Rig(*DECODE)
    rig.learn()
    placement = rig.place(20)
    assert (placement.prefill, placement.choice) == ((), PrefillChoice.WORKER)


def test_a_missing_report_makes_blind_until_a_whole_picture() -> None:
    rig = Rig(*ALL)
    rig.learn()
    keys = tuple(range(1, 65))
    assert rig.report("p1", registered=keys)
    rig.sequences[ref("p1")] += 1
    assert not rig.report("p1", queued_tokens=9)
    assert not rig.placer.fleet.index.match(keys, 100.0)
    assert not rig.report("p1")
    rig.sequences[ref("p1")] = 0
    assert rig.report("p1", registered=keys[:32])
    assert [match.num_blocks for match in rig.placer.fleet.index.match(keys, 100.0)] == [32]


def test_a_new_incarnation_starts_with_nothing_but_its_siblings_speed() -> None:
    rig = Rig(*ALL)
    rig.learn()
    keys = tuple(range(1, 65))
    rig.report("p1", registered=keys, queued_tokens=10_000)
    rig.placer.sync((*DECODE, PREFILL[0], view("p1", incarnation=2)))
    assert not rig.placer.fleet.index.match(keys, 100.0)
    worker = rig.placer.fleet.workers[ref("p1", 2)]
    assert worker.queued_tokens == 0
    assert worker.steps.b == pytest.approx(B, rel=0.1)
    assert names(rig.place(1024, keys))[1][0] in ("p0", "p1")


def test_a_forecast_says_what_a_dispatch_would_get() -> None:
    rig = Rig(*ALL)
    assert rig.placer.forecast("other", Prompt(10)) is None
    rough = rig.placer.forecast("m", Prompt(10))
    assert rough is not None
    assert not rough.learnt
    assert rough.room_tokens is None
    rig.learn()
    for name in ("d0", "d1"):
        rig.report(name, decoding=30, running=30, kv_tokens=3000, blocks_free=100)
    for name, queued in (("p0", 4000), ("p1", 2000)):
        rig.report(name, queued_tokens=queued)
    found = rig.placer.forecast("m", Prompt(1000, 10, 1, 16))
    assert found is not None
    assert found.learnt
    assert found.room_tokens == 2 * 1600
    expected_s = 8 * A + B * 2000 + 4 * A + B * 1000 + C * pairs(1000, 1000) + 0.011
    assert found.ttft_s == pytest.approx(expected_s, rel=0.1)
    assert found.tpot_s == pytest.approx(A + B * 31 + C * 4000, rel=0.1)
    assert rig.placer.fleet.workers[ref("p1")].unseen_requests == 0, "a forecast books nothing"


def test_admission_is_told_a_time_only_when_it_is_worth_something() -> None:
    rig = Rig(*ALL)
    request = Request("r", "m", tuple(range(3, 203)), SamplingParams(max_tokens=5, seed=0))
    assert rig.placer.predicted_ttft_s(request) is None
    rig.learn()
    predicted_s = rig.placer.predicted_ttft_s(request)
    assert predicted_s == pytest.approx(A + A + B * 200 + C * pairs(200, 200), rel=0.2)


def test_hand_offs_are_learnt_from_what_they_took() -> None:
    rig = Rig(*ALL)
    rig.report("p0")
    timings = StageTimings(transport="shm", transfer_blocks=64, transfer_exposed_s=0.08, rpc_s=0.015, activate_s=0.005)
    for _ in range(60):
        *_, dispatched = rig.send(1024)
        dispatched.started(Started(timings, 0))  # type: ignore[attr-defined]
        dispatched.close()  # type: ignore[attr-defined]
    assert rig.placer.fleet.handoff("m").seconds(1024) == pytest.approx(0.1, rel=0.05)
