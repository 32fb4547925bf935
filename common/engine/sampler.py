"""From logits to tokens.

    logits -> [log-probabilities are reported from these] -> `logit_rules` -> temperature -> top-k -> top-p -> min-p -> draw

A draw is a function of its own row of logits and its own `SampleSpec`, whoever else is in the batch: randomness is one number of
a counter-based generator, keyed by (seed, choice) and counted by position, and a row's probabilities are computed by themselves
in fp64. Equal logits are ordered by token id wherever order matters. Greedy rows are one argmax for the whole batch.

Logits that are not finite at their maximum come from broken memory or weights; no token is drawn from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.engine.batch import SampleSpec
from common.engine.logit_rules import apply_rules
from common.errors import EngineFailure
from common.types import SampledToken, TokenLogprob

_Floats = npt.NDArray[np.float64]
_WORD = (1 << 64) - 1


def sample(logits: torch.Tensor, specs: Sequence[SampleSpec], rows: Sequence[int]) -> list[SampledToken]:
    """Draws one token per spec; `specs[i]` reads `logits[rows[i]]` (fp32 [rows, vocab], left as it is)."""
    ruled = {i: spec.rules for i, spec in enumerate(specs) if spec.rules is not None}
    if not ruled:
        drawn = _pick(logits, specs, rows)
    else:
        drawn = [0] * len(specs)
        plain = [i for i in range(len(specs)) if i not in ruled]
        changed = logits.index_select(0, torch.tensor([rows[i] for i in ruled], device=logits.device))
        _check_finite(changed.amax(dim=-1).tolist())  # before rules hide what is broken
        apply_rules(changed, list(ruled.values()))
        for members, source, at in ((plain, logits, [rows[i] for i in plain]), (list(ruled), changed, range(len(ruled)))):
            for i, token_id in zip(members, _pick(source, [specs[i] for i in members], at), strict=True):
                drawn[i] = token_id
    reported = [i for i, spec in enumerate(specs) if spec.logprobs is not None]
    reports: dict[int, TokenLogprob] = {}
    if reported:
        index = torch.tensor([rows[i] for i in reported], device=logits.device)
        found = report_logprobs(
            logits.index_select(0, index), [drawn[i] for i in reported], [specs[i].logprobs or 0 for i in reported]
        )
        reports = dict(zip(reported, found, strict=True))
    return [SampledToken(token_id, reports.get(i)) for i, token_id in enumerate(drawn)]


def report_logprobs(logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    """Row by row: the log-probability of `token_ids[i]` and the best `num_top[i]` tokens, best first, then by id."""
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    tops = best_logprobs(logprobs, num_top)
    return [TokenLogprob(*parts) for parts in zip(token_ids, chosen, tops, strict=True)]


def best_logprobs(logprobs: torch.Tensor, num_top: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """Row by row: the best `num_top[i]` tokens with their log-probabilities, best first, then by id."""
    most = min(max(num_top), logprobs.shape[1])
    if most == 0:
        return [()] * len(num_top)
    # One more than asked for shows whether the last place is shared; `topk` leaves open which of equals it returns.
    values, token_ids = (part.tolist() for part in logprobs.topk(min(most + 1, logprobs.shape[1]), dim=-1))
    found: list[tuple[tuple[int, float], ...]] = []
    for row, count in enumerate(num_top):
        count = min(count, most)
        pairs = list(zip(token_ids[row], values[row], strict=True))
        if count and count < len(pairs) and values[row][count] == values[row][count - 1]:
            tied = (logprobs[row] >= values[row][count - 1]).nonzero()[:, 0].tolist()
            pairs = [(token_id, float(logprobs[row, token_id])) for token_id in tied]
        pairs.sort(key=lambda pair: (-pair[1], pair[0]))
        found.append(tuple(pairs[:count]))
    return found


def uniform(seed: int, choice: int, position: int) -> float:
    """The one random number in [0, 1) of a draw."""
    generator = np.random.Philox(
        key=np.array([seed & _WORD, choice], dtype=np.uint64), counter=np.array([position, 0, 0, 0], dtype=np.uint64)
    )
    return (int(generator.random_raw()) >> 11) * 2.0**-53


def candidates(row: npt.NDArray[np.float32], spec: SampleSpec) -> tuple[npt.NDArray[np.int64] | None, _Floats]:
    """The token ids that no filter takes out, ascending (None: all there are), and their weights, which are their probabilities
    but for a factor. The best token has weight 1 and is always among them."""
    best = float(row.max())
    _check_finite([best])
    token_ids: npt.NDArray[np.int64] | None = None
    if 0 < spec.top_k < len(row):
        token_ids = np.flatnonzero(_among_best(row, float(torch.from_numpy(row).topk(spec.top_k).values[-1]), spec.top_k))
        row = row[token_ids]
    weights = row.astype(np.float64)
    weights -= best
    weights /= spec.temperature
    np.exp(weights, out=weights)
    if spec.top_p < 1.0:
        _keep_top_p(weights, spec.top_p)
    if spec.min_p > 0.0:
        weights[weights < spec.min_p] = 0.0
    if spec.top_p < 1.0 or spec.min_p > 0.0:
        left = np.flatnonzero(weights > 0.0)
        token_ids, weights = left if token_ids is None else token_ids[left], weights[left]
    return token_ids, weights


def _pick(logits: torch.Tensor, specs: Sequence[SampleSpec], rows: Sequence[int]) -> list[int]:
    """A token per spec, from logits that are as they should be."""
    greedy = [i for i, spec in enumerate(specs) if spec.temperature == 0.0]
    drawn = [0] * len(specs)
    if greedy:
        for i, token_id in zip(greedy, _argmax(logits, [rows[i] for i in greedy]), strict=True):
            drawn[i] = token_id
    if len(greedy) < len(specs):
        on_host = logits.cpu().numpy()
        for i, spec in enumerate(specs):
            if spec.temperature != 0.0:
                drawn[i] = _draw(on_host[rows[i]], spec)
    return drawn


def _draw(row: npt.NDArray[np.float32], spec: SampleSpec) -> int:
    token_ids, weights = candidates(row, spec)
    cumulative = np.cumsum(weights)
    point = uniform(spec.seed, spec.choice, spec.position) * cumulative[-1]
    place = int(np.searchsorted(cumulative, point, side="right"))  # never one of weight 0: the sum does not pass `point` there
    if place == len(weights):  # `point` was rounded up to the total: the last one is what is meant
        place = int(np.flatnonzero(weights)[-1])
    return place if token_ids is None else int(token_ids[place])


def _keep_top_p(weights: _Floats, top_p: float) -> None:
    """Keeps the fewest best tokens that together have at least `top_p` of the mass."""
    total = weights.sum()
    target = top_p * total
    # Tokens below this weight cannot hold more than 1 - top_p together, so the rest holds the nucleus: sort only that.
    ranked = -np.sort(-weights[weights >= (total - target) / len(weights)])
    kept = min(int(np.searchsorted(np.cumsum(ranked), target, side="left")) + 1, len(ranked))
    weights[~_among_best(weights, ranked[kept - 1], kept)] = 0.0


def _among_best(values: npt.NDArray[np.floating[Any]], last: float, count: int) -> npt.NDArray[np.bool_]:
    """Which are the `count` largest, the last of which has the value `last`; of equal ones, those that come first."""
    keep: npt.NDArray[np.bool_] = values > last
    equal = np.flatnonzero(values == last)
    keep[equal[: count - int(np.count_nonzero(keep))]] = True
    return keep


def _argmax(logits: torch.Tensor, rows: Sequence[int]) -> list[int]:
    if logits.device.type == "cpu":  # numpy is ten times as fast here; where the two meet NaN, both say where it is
        on_host = logits.numpy()
        token_ids = {row: int(on_host[row].argmax()) for row in set(rows)}
        best = {row: float(on_host[row, token_id]) for row, token_id in token_ids.items()}
    else:
        values, found = logits.max(dim=-1)
        # One copy; token ids are exact in fp64.
        all_best, places = torch.stack((values.double(), found.double())).tolist()
        best, token_ids = dict(enumerate(all_best)), {row: int(place) for row, place in enumerate(places)}
    _check_finite([best[row] for row in rows])
    return [token_ids[row] for row in rows]


def _check_finite(values: Sequence[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise EngineFailure("the model's logits are not finite")
