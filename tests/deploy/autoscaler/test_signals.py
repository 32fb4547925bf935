"""From what workers say to what their pools need, with figures worked out by hand."""

from __future__ import annotations

import pytest

from common.config import AutoscalingConfig
from common.types import Role
from deploy.autoscaler.need import CapacityFit, decode_need, prefill_need
from deploy.autoscaler.signals import DecodeSignals, PrefillSignals, SignalWindow, WorkerReading


def prefill(worker_id: str, **values: float) -> WorkerReading:
    return WorkerReading(worker_id, 1, Role.PREFILL, **values)  # type: ignore[arg-type]


def decode(worker_id: str, **values: float) -> WorkerReading:
    return WorkerReading(worker_id, 1, Role.DECODE, **values)  # type: ignore[arg-type]


def test_rates_are_differences_of_totals_of_the_same_incarnation() -> None:
    window = SignalWindow(look_back_s=10.0, now_s=0.0)
    window.add([prefill("a", step_s=100.0, computed_tokens=5000), prefill("b", step_s=7.0, computed_tokens=70)], 0.0)
    window.add([prefill("a", step_s=103.0, computed_tokens=6000), prefill("b", step_s=8.0, computed_tokens=270)], 10.0)
    signals = window.signals().prefill
    assert signals.workers == 2
    assert signals.busy == pytest.approx(0.4)  # 3 s and 1 s of 10 s each
    assert signals.tokens_per_s == pytest.approx(1200 / 4)
    # Another incarnation begins at nothing: it is no sudden fall, and no rise.
    window.add([prefill("a", step_s=106.0, computed_tokens=6900), WorkerReading("b", 2, Role.PREFILL, step_s=0.5)], 20.0)
    assert window.signals().prefill.busy == pytest.approx(2 * 3 / 10)


def test_levels_are_means_over_the_window_and_old_moments_are_forgotten() -> None:
    window = SignalWindow(look_back_s=2.0, now_s=0.0)
    for second, sequences in enumerate((100, 4, 6, 8)):
        window.add([decode("a", decoding=sequences, blocks_total=10, blocks_free=4)], float(second))
    signals = window.signals().decode
    assert signals.sequences == pytest.approx(6.0)
    assert signals.kv_used == pytest.approx(0.6)
    assert signals.tpot_s is None


def test_time_per_token_is_weighted_by_sequences() -> None:
    window = SignalWindow(look_back_s=10.0, now_s=0.0)
    window.add([decode("a"), decode("b")], 0.0)
    # a: 4 sequences, 50 steps of 20 ms; b: 1 sequence, 100 steps of 10 ms
    window.add(
        [
            decode("a", generated_tokens=200, step_s=1.0, sequence_step_s=4.0),
            decode("b", generated_tokens=100, step_s=1.0, sequence_step_s=1.0),
        ],
        2.0,
    )
    signals = window.signals().decode
    assert signals.tpot_s == pytest.approx(5.0 / 300)
    assert signals.tokens_per_s == pytest.approx(150.0)
    assert signals.batch == pytest.approx(2.5)


def test_use_is_what_workers_hold_or_served_or_somebody_asked_for() -> None:
    window = SignalWindow(look_back_s=5.0, now_s=0.0)
    window.add([decode("a")], 10.0)
    assert window.signals().last_use_s == 0.0
    window.add([decode("a", served=3)], 11.0)
    window.add([decode("a", served=3)], 12.0)
    assert window.signals().last_use_s == 11.0
    window.add([decode("a", served=3, requests=1)], 13.0)
    window.add([decode("a", served=3)], 20.0)
    assert window.signals().last_use_s == 13.0
    window.used(21.0)
    assert window.signals().last_use_s == 21.0


CONFIG = AutoscalingConfig(
    target_utilization=0.5, target_ttft_s=2.0, target_queue_age_s=0.5, target_tpot_s=0.05, target_kv_use=0.5
)


@pytest.mark.parametrize(
    ("signals", "workers", "word"),
    [
        (PrefillSignals(2, busy=1.5), 3.0, "computes 75%"),
        (PrefillSignals(2, busy=0.1, tokens_per_s=100.0, queued_tokens=1000.0), 5.0, "1000 prompt tokens wait, 10.00 s"),
        (PrefillSignals(2, busy=0.1, queue_age_s=0.6), 3.0, "waited 0.60 s"),
        (PrefillSignals(2, busy=0.1, queue_age_s=0.4), 0.2, "computes 5%"),
    ],
)
def test_prefill_needs(signals: PrefillSignals, workers: float, word: str) -> None:
    need = prefill_need(CONFIG, signals)
    assert need.workers == pytest.approx(workers)
    assert word in need.reason


@pytest.mark.parametrize(
    ("signals", "workers", "word"),
    [
        (DecodeSignals(2, kv_used=1.5), 3.0, "75% of the decode KV"),
        # 15 sequences keep 50 ms: 300 tokens/s; 30 at 40 ms are 750
        (DecodeSignals(2, tokens_per_s=750.0, tpot_s=0.04), 2.5, "750 tokens/s"),
        (DecodeSignals(2, tokens_per_s=33.0, tpot_s=0.06), 2.4, "a token takes 60 ms"),
        (DecodeSignals(2, tokens_per_s=4.0, tpot_s=0.50), 3.0, "a token takes 500 ms"),
        (DecodeSignals(1, queue_age_s=3.0), 2.0, "waited 3.00 s"),
    ],
)
def test_decode_needs(signals: DecodeSignals, workers: float, word: str) -> None:
    fit = CapacityFit()
    for sequences in (5.0, 10.0, 20.0):
        fit = fit.seen(sequences, 0.02 + 0.002 * sequences)
    assert fit.sequences_at(0.05) == pytest.approx(15.0)
    need = decode_need(CONFIG, signals, fit)
    assert need.workers == pytest.approx(workers)
    assert word in need.reason


def test_an_operators_own_figure_replaces_what_is_learnt() -> None:
    config = CONFIG.model_copy(update={"target_ongoing_requests": 4.0})
    need = decode_need(config, DecodeSignals(2, sequences=10.0, tpot_s=0.01), CapacityFit().seen(100.0, 0.001))
    assert need.workers == pytest.approx(2.5)


def test_one_point_of_the_line_comes_with_a_prior_for_its_slope() -> None:
    # 5 sequences at 20 ms: 1 ms each and 15 ms for nothing, so 35 at 50 ms
    assert CapacityFit().seen(5.0, 0.02).sequences_at(0.05) == pytest.approx(35.0)
    assert CapacityFit().sequences_at(0.05) is None
    assert CapacityFit().seen(1.0, 0.2).sequences_at(0.05) == 1.0
