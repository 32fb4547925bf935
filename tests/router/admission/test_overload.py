"""What the benchmark claims, on a small scale: it computes in virtual time, so its figures are the same everywhere."""

from __future__ import annotations

import json

import pytest

from benchmarks import admission


def test_with_early_refusal_overload_costs_little_and_without_it_nearly_everything() -> None:
    rows = admission.overload(120.0, seed=3, loads=(0.8, 1.2))
    figures = {(row["load"], row["early_refusal"]): row for row in rows}
    assert figures[0.8, True]["refused_share"] < 0.02
    assert figures[1.2, True]["goodput"] >= 0.9  # type: ignore[operator]
    assert figures[1.2, True]["kept_of_served"] >= 0.9  # type: ignore[operator]
    assert figures[1.2, False]["goodput"] <= 0.4  # type: ignore[operator]


def test_the_simulated_worker_is_as_fast_as_its_steps() -> None:
    """Two requests, by hand: the prompts are computed in one step, then each draws two more tokens."""
    worker = admission.Worker()
    worker.give(0, admission.Work(0.0, 100, 3))
    worker.give(1, admission.Work(0.0, 50, 3))
    steps = [worker.step() for _ in range(3)]
    assert [duration_s for duration_s, *_ in steps] == pytest.approx(
        [admission.STEP_S + admission.TOKEN_S * tokens for tokens in (150, 2, 2)]
    )
    assert [(len(first), len(later), len(ended)) for _, first, later, ended in steps] == [(2, 0, 0), (0, 2, 0), (0, 2, 2)]
    assert worker.idle


def test_only_counters_keep_the_bound(capsys: pytest.CaptureFixture[str]) -> None:
    assert admission.main(["--seconds", "5", "--steps", "1500", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["order"]: row["within"] for row in found["fairness"]} == {"counters": True, "first come": False, "in turn": False}
