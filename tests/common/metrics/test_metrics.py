"""What a scrape of a worker shows, computed from its state."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest
from prometheus_client import CollectorRegistry

from common.metrics import (
    CostReadings,
    LeaseReadings,
    MaskReadings,
    ObserveMetrics,
    ObserveReadings,
    PromiseReadings,
    WorkerMetrics,
    WorkerReadings,
    start_metrics_server,
)

IDLE = WorkerReadings(
    requests_running=0,
    requests_waiting=0,
    blocks_total=8,
    blocks_free=8,
    blocks_cached=0,
    blocks_used=0,
    blocks_in_transfer=0,
    leases=LeaseReadings(),
    block_tokens=16,
    computed_tokens=0,
    generated_tokens=0,
    preemptions=0,
    prefix_queries=0,
    prefix_hits=0,
    drafted_tokens=0,
    accepted_tokens=0,
    steps_by_accepted=(),
    guesses_by_author={},
    work_s={"prefill": 0.0, "decode": 0.0, "wasted": 0.0},
    masks=MaskReadings(),
)
WHO = {"model_name": "m", "engine": "decode"}


def scrape(readings: WorkerReadings) -> CollectorRegistry:
    registry = CollectorRegistry()
    WorkerMetrics(registry, model="m", role="decode", read=lambda: readings)
    return registry


@pytest.mark.parametrize("accept", ["", "*/*", "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"])
def test_whoever_asks_gets_the_names_that_boards_know(accept: str) -> None:
    address, stop = start_metrics_server(scrape(IDLE), "127.0.0.1", cluster_token="")
    try:
        reply = httpx.get(f"http://{address}/metrics", headers={"accept": accept}, trust_env=False)
    finally:
        stop()
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert 'vllm:num_requests_running{engine="decode",model_name="m"} 0.0' in reply.text.splitlines()


def test_speculation_is_told_by_tokens_and_by_steps() -> None:
    """Ten steps with drafts: four with none right, five with one, one with three."""
    registry = scrape(replace(IDLE, drafted_tokens=30, accepted_tokens=8, steps_by_accepted=(4, 5, 0, 1)))
    assert registry.get_sample_value("vllm:spec_decode_num_draft_tokens_total", WHO) == 30
    assert registry.get_sample_value("vllm:spec_decode_num_accepted_tokens_total", WHO) == 8
    assert registry.get_sample_value("pdserve_speculation_wasted_rows_total", WHO) == 22
    histogram = "pdserve_speculation_accepted_tokens"
    found = [registry.get_sample_value(f"{histogram}_bucket", {**WHO, "le": le}) for le in ("0.0", "1.0", "2.0", "3.0", "+Inf")]
    assert found == [4, 9, 9, 10, 10]
    assert registry.get_sample_value(f"{histogram}_count", WHO) == 10
    assert registry.get_sample_value(f"{histogram}_sum", WHO) == 8


def test_each_proposer_has_its_own_account() -> None:
    registry = scrape(replace(IDLE, guesses_by_author={"ngram": (20, 5), "medusa": (10, 4)}))
    for author, outcome, count in (("ngram", "right", 5), ("ngram", "wrong", 15), ("medusa", "right", 4), ("medusa", "wrong", 6)):
        labels = {**WHO, "proposer": author, "outcome": outcome}
        assert registry.get_sample_value("pdserve_speculation_guesses_total", labels) == count


def test_a_worker_that_never_guessed_has_an_empty_histogram() -> None:
    assert scrape(IDLE).get_sample_value("pdserve_speculation_accepted_tokens_count", WHO) == 0


def test_leases_masks_and_the_time_of_steps_are_shown() -> None:
    leases = LeaseReadings(open=3, expired=2, oldest_s=7.5, quarantined=1, quarantined_oldest_s=4.0)
    work_s = {"prefill": 1.0, "decode": 2.0, "wasted": 0.5}
    readings = replace(IDLE, leases=leases, masks=MaskReadings(9, 0.25), work_s=work_s, steps_by_accepted=(4, 5, 0, 1))
    registry = scrape(readings)
    for name, expected in {
        "pdserve_kv_leases_open": 3,
        "pdserve_kv_leases_expired_total": 2,
        "pdserve_kv_lease_oldest_seconds": 7.5,
        "pdserve_kv_leases_quarantined": 1,
        "pdserve_kv_quarantine_oldest_seconds": 4.0,
        "pdserve_grammar_masks_total": 9,
        "pdserve_grammar_mask_seconds_total": 0.25,
        "vllm:spec_decode_num_drafts_total": 10,
    }.items():
        assert registry.get_sample_value(name, WHO) == expected, name
    for part, seconds in work_s.items():
        assert registry.get_sample_value("pdserve_work_seconds_total", {**WHO, "part": part}) == seconds


def test_steps_ahead_what_they_waited_for_and_swaps_are_counted() -> None:
    registry = scrape(replace(IDLE, steps_ahead=7, waits={"rules": 3, "room": 1}, surplus_rows=2, swapped_out=5, swapped_in=4))
    for name, expected in {
        "pdserve_steps_ahead_total": 7,
        "pdserve_surplus_rows_total": 2,
        "pdserve_swapped_out_total": 5,
        "pdserve_swapped_in_total": 4,
    }.items():
        assert registry.get_sample_value(name, WHO) == expected, name
    for reason, expected in {"rules": 3, "room": 1}.items():
        assert registry.get_sample_value("pdserve_step_waits_total", {**WHO, "reason": reason}) == expected


def test_grammars_count_by_outcome_and_those_that_were_compiled_by_time() -> None:
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry, model="m", role="decode", read=lambda: IDLE)
    metrics.grammar("cached")
    metrics.grammar("compiled", 0.5)
    metrics.grammar("refused", 2.0)
    for outcome in ("cached", "compiled", "refused"):
        assert registry.get_sample_value("pdserve_grammar_requests_total", {**WHO, "outcome": outcome}) == 1
    assert registry.get_sample_value("pdserve_grammar_compile_seconds_count", WHO) == 2
    assert registry.get_sample_value("pdserve_grammar_compile_seconds_sum", WHO) == 2.5


def test_promises_costs_and_fairness_are_read_when_they_are_scraped() -> None:
    registry = CollectorRegistry()
    metrics = ObserveMetrics(registry)
    assert registry.get_sample_value("pdserve_slo_met_ratio", {"slo": "batch"}) is None
    metrics.ended("m")
    metrics.ended("m", slo="batch")
    metrics.ended("m", slo="batch", met=False)
    metrics.ended("m", unexplained_ratio=0.25, tokens=(30, 4))
    cost = CostReadings("m", {"decode": 2.0}, 3.0, {"decode": 7}, {"decode": 0.5}, 0.75)
    readings = ObserveReadings((PromiseReadings("batch", 0.75, 1.5),), (cost,), {("m", "batch"): 0.9})
    metrics.read_from(lambda: readings)
    part = {"model_name": "m", "part": "decode"}
    for name, labels, expected in (
        ("pdserve_slo_requests_total", {"model_name": "m", "slo": "batch", "outcome": "missed"}, 1),
        ("pdserve_slo_requests_total", {"model_name": "m", "slo": "batch", "outcome": "met"}, None),
        ("pdserve_waterfall_unexplained_ratio_sum", {"model_name": "m"}, 0.25),
        ("vllm:request_prompt_tokens_sum", {"model_name": "m"}, 30),
        ("vllm:request_generation_tokens_sum", {"model_name": "m"}, 4),
        ("pdserve_slo_met_ratio", {"slo": "batch"}, 0.75),
        ("pdserve_goodput_requests_per_second", {"slo": "batch"}, 1.5),
        ("pdserve_cost_seconds_total", part, 2.0),
        ("pdserve_cost_tokens_total", part, 7),
        ("pdserve_cost_money_total", part, 0.5),
        ("pdserve_cost_saved_seconds_total", {"model_name": "m"}, 3.0),
        ("pdserve_cost_saved_money_total", {"model_name": "m"}, 0.75),
        ("pdserve_fairness_jain_index", {"model_name": "m", "band": "batch"}, 0.9),
    ):
        assert registry.get_sample_value(name, labels) == expected, name
