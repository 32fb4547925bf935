"""What simulations have found, as the smallest case that shows it."""

from __future__ import annotations

from dataclasses import replace

from common.blocks import root_hash
from common.clock import ManualClock
from common.config import DecodeConfig
from common.engine.batch import ForwardResult, SliceResult
from common.engine.block_manager import BlockManager
from common.types import Request, SampledToken, SamplingParams
from decode_worker.scheduler import DecodeScheduler
from support.simulation.network import Disorder, Point
from support.simulation.scenario import ALIKE, Fault, RequestPlan, Trouble, draw_scenario
from support.simulation.world import simulate, simulated_rpc


def test_no_copy_is_made_into_a_block_that_was_given_back() -> None:
    """Choices that end with their first token had a copy of the prompt's last block still to be made, into a free block."""
    layout = ALIKE.layout
    blocks = BlockManager(16, layout.block_tokens, lambda salt: root_hash(layout.fingerprint, salt))
    scheduler = DecodeScheduler(DecodeConfig(local_prefill="always"), layout, blocks, ManualClock())
    prompt = tuple(range(layout.block_tokens + 1))
    request = Request("r", "m", prompt, SamplingParams(max_tokens=1, seed=1), num_choices=2)
    scheduler.submit(request, ())
    plan = scheduler.schedule()
    scheduler.complete(plan, ForwardResult((SliceResult((SampledToken(1), SampledToken(2))),)))
    assert scheduler.is_idle
    assert scheduler.schedule().copies == ()


def test_a_request_ends_in_time_when_its_worker_is_stopped_before_it_could_be_reached() -> None:
    """Connecting had a time of its own, for every try, and the request's deadline was looked at afterwards."""
    scenario = replace(
        draw_scenario(1),
        num_prefill=1,
        num_decode=1,
        long_turns=0.0,
        disorder=Disorder(),
        requests=(RequestPlan("q0", 0.005, (1, 2, 3, 4, 5), 2, seed=1, num_choices=1, timeout_s=3.0),),
        faults=(Fault(Trouble.PAUSE, "d0", at_s=0.0, lasts_s=18.0),),
    )
    with simulated_rpc():
        verdict = simulate(scenario)
    assert verdict.ok, verdict.complaints
    assert [ending.how for ending in verdict.endings] == ["DeadlineExceeded"]


def test_the_rest_of_an_answer_is_not_tried_beyond_the_deadline() -> None:
    """The back-off before the next try had no regard for the time that was left: with its workers gone it was up to 1 s late."""
    scenario = replace(
        draw_scenario(1),
        num_prefill=1,
        num_decode=1,
        local_prefill="never",
        long_turns=0.0,
        detection_s=0.01,
        news_s=0.001,
        disorder=Disorder(),
        requests=(RequestPlan("q0", 0.005, (1, 2, 3, 4, 5), 6, seed=1, num_choices=1, timeout_s=2.7),),
        faults=(
            Fault(Trouble.CRASH, "p0", point=Point.TOKENS_SENT, count=2),
            Fault(Trouble.CRASH, "d0", point=Point.TOKENS_SENT, count=2, lasts_s=0.1),
        ),
    )
    with simulated_rpc():
        verdict = simulate(scenario)
    assert verdict.ok, verdict.complaints
    assert [ending.how for ending in verdict.endings] == ["DeadlineExceeded"]
