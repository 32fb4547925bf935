"""What is fetched too late, out of sources that hold something else by now, is in no answer."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import pytest

from support.simulation.mutants import Mutant, broken_by, digest_skipped, finished_before_taken
from support.simulation.network import Disorder, Point
from support.simulation.scenario import ALIKE, Fault, RequestPlan, Scenario, Trouble, draw_scenario
from support.simulation.world import Verdict, simulate, simulated_rpc

STOPPED_S = 7.0
SEEDS = range(1, 21)
TICKETS_S = {"ticket": 2.0, "lease": 10.0}  # what is over first, while the decode worker is stopped


def stopped_before_it_fetches(seed: int, over: str) -> Scenario:
    """The decode worker is stopped when something is ready for it. The prompts that come meanwhile, for another one, need all of
    the prefill worker's pool."""
    requests = [RequestPlan("q0", 0.001, tuple(range(12)), 3, seed, num_choices=1, timeout_s=20.0)]
    for number in range(1, 7):
        prompt = tuple(range(100 * number, 100 * number + 20))
        requests.append(RequestPlan(f"q{number}", 5.0 + 0.1 * number, prompt, 3, seed, num_choices=1, timeout_s=20.0))
    return replace(
        draw_scenario(seed),
        num_prefill=1,
        num_decode=2,
        prefill_tokens=32,
        decode_tokens=76,
        transports=("shm",),
        local_prefill="never",
        narrow_window=False,
        ticket_ttl_s=TICKETS_S[over],
        prefill_cut=ALIKE,
        decode_cut=ALIKE,
        disorder=Disorder(),
        requests=tuple(requests),
        faults=(Fault(Trouble.PAUSE, "d0", point=Point.READY_SENT, count=1, lasts_s=STOPPED_S),),
    )


def outcomes(over: str) -> list[Verdict]:
    with simulated_rpc():
        return [simulate(stopped_before_it_fetches(seed, over)) for seed in SEEDS]


def complaints(*broken: Mutant) -> str:
    with ExitStack() as stack:
        for mutant in broken:
            stack.enter_context(broken_by(mutant))
        return "\n".join(complaint for verdict in outcomes("lease") for complaint in verdict.complaints)


@pytest.mark.parametrize("over", TICKETS_S)
def test_sources_that_were_given_up_are_fetched_and_not_used(over: str) -> None:
    verdicts = outcomes(over)
    assert [verdict.complaints for verdict in verdicts if not verdict.ok] == []
    assert sum(verdict.stale_fetches for verdict in verdicts) >= len(SEEDS)
    assert {ending.how for verdict in verdicts for ending in verdict.endings if ending.plan.name != "q0"} == {"served"}


def test_digests_keep_them_out_even_if_their_transfer_has_finished() -> None:
    too_early = complaints(finished_before_taken)
    assert "is fetched by a transfer that has finished" in too_early
    assert "wrong tokens" not in too_early
    assert "wrong tokens" in complaints(finished_before_taken, digest_skipped)
