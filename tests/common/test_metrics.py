"""What a scrape of a worker shows, computed from its state."""

from __future__ import annotations

from dataclasses import replace

from prometheus_client import CollectorRegistry

from common.metrics import WorkerMetrics, WorkerReadings

IDLE = WorkerReadings(
    requests_running=0,
    requests_waiting=0,
    blocks_total=8,
    blocks_free=8,
    blocks_cached=0,
    blocks_used=0,
    blocks_in_transfer=0,
    leases_open=0,
    block_tokens=16,
    computed_tokens=0,
    generated_tokens=0,
    preemptions=0,
    prefix_queries=0,
    prefix_hits=0,
    drafted_tokens=0,
    accepted_tokens=0,
    steps_by_accepted=(),
)
WHO = {"model_name": "m", "engine": "decode"}


def scrape(readings: WorkerReadings) -> CollectorRegistry:
    registry = CollectorRegistry()
    WorkerMetrics(registry, model="m", role="decode", read=lambda: readings)
    return registry


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


def test_a_worker_that_never_guessed_has_an_empty_histogram() -> None:
    assert scrape(IDLE).get_sample_value("pdserve_speculation_accepted_tokens_count", WHO) == 0
