"""The law over queues in virtual time: it finds the sizes that a load needs, follows it, and rests when it does not change."""

from __future__ import annotations

import pytest

from benchmarks.pool_simulation import Hardware, Mix, PoolSimulation, arrivals, goodput
from common.config import AutoscalingConfig
from deploy.autoscaler.law import Act

PROMPT_HEAVY = Mix(per_s=2.0, prompt_tokens=4000, output_tokens=30)  # 2 prefill workers' work, a little decoding
OUTPUT_HEAVY = Mix(per_s=2.0, prompt_tokens=300, output_tokens=900)  # hardly any prefill, some 60 tokens/s * 30
HARDWARE = Hardware(start_s=5.0)


def config_of(**changes: object) -> AutoscalingConfig:
    plain = {
        "mode": "on",
        "prefill": {"max_replicas": 6},
        "decode": {"max_replicas": 6},
        "upscale_delay_s": 10.0,
        "downscale_delay_s": 60.0,
    }
    return AutoscalingConfig.model_validate({**plain, **changes})


@pytest.mark.parametrize("mix", [PROMPT_HEAVY, OUTPUT_HEAVY], ids=["prompts", "outputs"])
def test_under_constant_load_it_comes_to_rest_with_everybody_served_in_time(mix: Mix) -> None:
    jobs = list(arrivals(lambda _: mix, 900.0, seed=1))
    simulation = PoolSimulation(jobs, prefill=1, decode=1, config=config_of(), hardware=HARDWARE)
    simulation.run(960.0)
    late = [decision.text for at_s, decision in simulation.decisions if at_s > 450.0]
    assert len(late) <= 1, late
    assert goodput([job for job in jobs if job.arrived_s > 450.0], ttft_s=2.0, tpot_s=0.05) > 0.97


def test_when_prompts_give_way_to_outputs_workers_follow_by_changing_their_role() -> None:
    jobs = list(arrivals(lambda at_s: PROMPT_HEAVY if at_s < 300.0 else OUTPUT_HEAVY, 600.0, seed=2))
    config = config_of(max_workers=5)
    simulation = PoolSimulation(jobs, prefill=1, decode=4, config=config, hardware=HARDWARE)
    simulation.run(660.0)
    sizes = {int(at_s): (prefill, decode) for at_s, prefill, decode in simulation.sizes}
    assert sizes[290][0] >= 3
    assert sizes[590][1] >= 3
    assert all(prefill + decode <= 5 for prefill, decode in sizes.values())
    acts = [decision.act for _, decision in simulation.decisions]
    assert acts.count(Act.FLIP) >= 3
    assert all(job.finished_s is not None for job in jobs)


def test_a_model_that_nobody_uses_sleeps_and_the_first_request_wakes_it() -> None:
    config = config_of(prefill={"min_replicas": 0, "max_replicas": 2}, decode={"min_replicas": 0, "max_replicas": 2}, idle_s=60.0)
    mix = Mix(per_s=1.0, prompt_tokens=200, output_tokens=20)
    jobs = [
        *(job for job in arrivals(lambda _: mix, 30.0, seed=3)),
        *(job for job in arrivals(lambda at_s: mix if at_s > 200.0 else Mix(0.0, 2, 2), 230.0, seed=4)),
    ]
    simulation = PoolSimulation(jobs, prefill=1, decode=1, config=config, hardware=HARDWARE)
    simulation.run(260.0)
    assert [decision.act for _, decision in simulation.decisions][:2] == [Act.SLEEP, Act.WAKE]
    assert all(job.finished_s is not None for job in jobs)
