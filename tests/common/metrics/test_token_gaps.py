"""The histogram of gaps says what the metrics library's own says of the same values."""

from __future__ import annotations

import random

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from common.metrics.token_gaps import TokenGaps

BOUNDS_S = (0.001, 0.01, 0.05, 0.1, 1, 2.5)


def lines(registry: CollectorRegistry) -> list[str]:
    """Without the moments at which the library's counters were made, which this one does not tell."""
    found = generate_latest(registry).decode().splitlines()
    return sorted(line for line in found if "_created" not in line)


def test_it_tells_what_the_library_tells() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    gaps = TokenGaps("vllm:gap_seconds", "Gaps.", BOUNDS_S, registry=ours)
    histogram = Histogram("vllm:gap_seconds", "Gaps.", ("model_name",), buckets=BOUNDS_S, registry=theirs)
    rng = random.Random(5)
    for model in ("a", "b"):
        of = gaps.of(model)
        assert gaps.of(model) is of
        for _ in range(300):
            value = rng.choice([*BOUNDS_S, 0.0, rng.random() / 8, 3 * rng.random()])
            of.observe(value)
            histogram.labels(model).observe(value)
    assert len(lines(ours)) > 16
    assert lines(ours) == lines(theirs)
