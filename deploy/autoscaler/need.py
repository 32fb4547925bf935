"""How many workers each pool of a model needs, as a number with a reason.

    prefill   the largest of: computing time / target_utilization;  time that the queue takes / target_ttft_s;
              one more while somebody waits longer than target_queue_age_s
    decode    the largest of: tokens per second / those of one worker that just keeps target_tpot_s;  KV in use / target_kv_use;
              one more while tokens take longer than target_tpot_s, or somebody waits too long

A need is measured in workers and does not depend on how many there are, as far as that can be had: it is work per second, not
waiting. So a pool that has what it needs is not changed again by its own change. What a decode worker can do is learnt: time per
token is close to a straight line over sequences in a step (`CapacityFit`). Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.config import AutoscalingConfig
from deploy.autoscaler.signals import DecodeSignals, PrefillSignals

_KEPT = 0.995  # of what was seen before, per look
_LEAST_SPREAD = 0.5  # sequences squared; below it no slope can be told
_PRIOR_BASE = 15.0  # then a step is thought to take as long for nothing as for so many sequences


@dataclass(frozen=True, slots=True)
class Need:
    workers: float
    reason: str


@dataclass(frozen=True, slots=True)
class CapacityFit:
    """Time per token over sequences in a step: sums of a least-squares line, old ones fading. While the sequences do not vary
    there is a prior in place of a slope; if it is too good, tokens take too long for a while, and then they vary."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def seen(self, sequences: float, tpot_s: float) -> CapacityFit:
        return CapacityFit(
            self.weight * _KEPT + 1.0,
            self.x * _KEPT + sequences,
            self.y * _KEPT + tpot_s,
            self.xx * _KEPT + sequences * sequences,
            self.xy * _KEPT + sequences * tpot_s,
        )

    def sequences_at(self, target_tpot_s: float) -> float | None:
        """How many a worker can have and keep the target; None while nothing was seen. Not less than one."""
        if self.weight == 0.0 or self.x <= 0.0 or self.y <= 0.0:
            return None
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        spread = self.xx / self.weight - mean_x * mean_x
        slope = (self.xy / self.weight - mean_x * mean_y) / spread if spread >= _LEAST_SPREAD else 0.0
        if slope <= 0.0:
            slope = mean_y / (mean_x + _PRIOR_BASE)
        base = max(0.0, mean_y - slope * mean_x)
        return max(1.0, (target_tpot_s - base) / slope)


def prefill_need(config: AutoscalingConfig, signals: PrefillSignals) -> Need:
    needs = [
        Need(
            signals.busy / config.target_utilization,
            f"prefill computes {_share(signals.busy, signals.workers)} of the time,"
            f" wanted at most {config.target_utilization:.0%}",
        )
    ]
    if signals.tokens_per_s:
        backlog_s = signals.queued_tokens / signals.tokens_per_s
        needs.append(
            Need(
                backlog_s / config.target_ttft_s,
                f"{signals.queued_tokens:.0f} prompt tokens wait, {backlog_s:.2f} s of one worker's work,"
                f" wanted within {config.target_ttft_s:g} s",
            )
        )
    needs += _waits_too_long(config, "prompt", signals.workers, signals.queue_age_s)
    return max(needs, key=lambda need: need.workers)


def decode_need(config: AutoscalingConfig, signals: DecodeSignals, fit: CapacityFit) -> Need:
    needs = [
        Need(
            signals.kv_used / config.target_kv_use,
            f"{_share(signals.kv_used, signals.workers)} of the decode KV is in use, wanted at most {config.target_kv_use:.0%}",
        )
    ]
    if config.target_ongoing_requests is not None:
        most = config.target_ongoing_requests
        needs.append(Need(signals.sequences / most, f"{signals.sequences:.1f} sequences are decoded, wanted {most:g} per worker"))
    elif signals.tpot_s is not None:
        capacity = fit.sequences_at(config.target_tpot_s)
        if capacity is not None:
            tokens_per_s, most_per_s = signals.tokens_per_s, capacity / config.target_tpot_s
            needs.append(
                Need(
                    tokens_per_s / most_per_s,
                    f"{tokens_per_s:.0f} tokens/s are decoded, and a worker keeps {config.target_tpot_s * 1e3:.0f} ms per token"
                    f" up to {most_per_s:.0f}",
                )
            )
    if signals.tpot_s is not None and signals.tpot_s > config.target_tpot_s:
        times = min(signals.tpot_s / config.target_tpot_s, 1.0 + 1.0 / max(1, signals.workers))
        needs.append(
            Need(
                signals.workers * times,
                f"a token takes {signals.tpot_s * 1e3:.0f} ms, wanted {config.target_tpot_s * 1e3:.0f} ms",
            )
        )
    needs += _waits_too_long(config, "request", signals.workers, signals.queue_age_s)
    return max(needs, key=lambda need: need.workers)


def _waits_too_long(config: AutoscalingConfig, what: str, workers: int, age_s: float) -> list[Need]:
    if age_s <= config.target_queue_age_s:
        return []
    return [Need(workers + 1.0, f"a {what} has waited {age_s:.2f} s, wanted at most {config.target_queue_age_s:g} s")]


def _share(part: float, of: int) -> str:
    return f"{part / of:.0%}" if of else "0%"
