"""From logits to tokens.

    logits -> [log-probabilities are reported from these] -> banned ids -> temperature -> top-k -> top-p -> min-p -> draw

A draw is a function of its own row of logits and its own `SampleSpec`, whoever else is in the batch: randomness is one number of
a counter-based generator, keyed by (seed, choice) and counted by position, and a row's probabilities are computed by themselves
in fp64. Equal logits are ordered by token id wherever order matters. Greedy rows are one argmax for the whole batch.

Logits that are not finite at their maximum come from broken memory or weights; no token is drawn from them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from common.engine.batch import SampleSpec
from common.errors import EngineFailure
from common.types import SampledToken, TokenLogprob

_Floats = npt.NDArray[np.float64]
_WORD = (1 << 64) - 1


def sample(logits: torch.Tensor, specs: Sequence[SampleSpec], rows: Sequence[int]) -> list[SampledToken]:
    """Draws one token per spec; `specs[i]` reads `logits[rows[i]]` (fp32 [rows, vocab], left as it is)."""
    greedy = [i for i, spec in enumerate(specs) if spec.temperature == 0.0]
    drawn = [0] * len(specs)
    if greedy:
        for i, token_id in zip(greedy, _argmax(logits, [specs[i] for i in greedy], [rows[i] for i in greedy]), strict=True):
            drawn[i] = token_id
    if len(greedy) < len(specs):
        on_host = logits.cpu().numpy()
        for i, spec in enumerate(specs):
            if spec.temperature != 0.0:
                drawn[i] = _draw(on_host[rows[i]], spec)
    reported = [i for i, spec in enumerate(specs) if spec.logprobs is not None]
    reports: dict[int, TokenLogprob] = {}
    if reported:
        index = torch.tensor([rows[i] for i in reported], device=logits.device)
        found = report_logprobs(logits[index], [drawn[i] for i in reported], [specs[i].logprobs or 0 for i in reported])
        reports = dict(zip(reported, found, strict=True))
    return [SampledToken(token_id, reports.get(i)) for i, token_id in enumerate(drawn)]


def report_logprobs(logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    """Row by row: the log-probability of `token_ids[i]` and the best `num_top[i]` tokens, best first, then by id."""
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    tops = _best(logprobs, num_top)
    return [TokenLogprob(*parts) for parts in zip(token_ids, chosen, tops, strict=True)]


def uniform(seed: int, choice: int, position: int) -> float:
    """The one random number in [0, 1) of a draw."""
    generator = np.random.Philox(
        key=np.array([seed & _WORD, choice], dtype=np.uint64), counter=np.array([position, 0, 0, 0], dtype=np.uint64)
    )
    return (int(generator.random_raw()) >> 11) * 2.0**-53


def filtered_weights(row: npt.NDArray[np.float32], spec: SampleSpec) -> _Floats:
    """Unnormalised probabilities after every filter; the best token has weight 1 and is never filtered out."""
    scaled = row.astype(np.float64)
    scaled[list(spec.banned_token_ids)] = -np.inf
    best = scaled.max()
    if not np.isfinite(best):
        raise EngineFailure("the model's logits are not finite")
    scaled -= best
    scaled /= spec.temperature
    weights = np.exp(scaled)
    if 0 < spec.top_k < len(weights):
        _keep_top_k(weights, scaled, spec.top_k)
    if spec.top_p < 1.0:
        _keep_top_p(weights, spec.top_p)
    if spec.min_p > 0.0:
        weights[weights < spec.min_p] = 0.0
    return weights


def _draw(row: npt.NDArray[np.float32], spec: SampleSpec) -> int:
    weights = filtered_weights(row, spec)
    candidates = np.flatnonzero(weights)
    cumulative = np.cumsum(weights[candidates])
    point = uniform(spec.seed, spec.choice, spec.position) * cumulative[-1]
    # `point` may round up to the total; the last candidate is what is meant then.
    return int(candidates[min(int(np.searchsorted(cumulative, point, side="right")), len(candidates) - 1)])


def _keep_top_k(weights: _Floats, scaled: _Floats, top_k: int) -> None:
    threshold = np.partition(scaled, len(scaled) - top_k)[len(scaled) - top_k]
    keep = scaled > threshold
    keep[np.flatnonzero(scaled == threshold)[: top_k - int(keep.sum())]] = True
    weights[~keep] = 0.0


def _keep_top_p(weights: _Floats, top_p: float) -> None:
    """Keeps the fewest best tokens that together have at least `top_p` of the mass."""
    target = top_p * weights.sum()
    # Tokens below this weight cannot hold more than 1 - top_p together, so the rest holds the nucleus: sort only that.
    candidates = np.flatnonzero(weights >= (weights.sum() - target) / len(weights))
    order = candidates[np.argsort(-weights[candidates], kind="stable")]
    kept = int(np.searchsorted(np.cumsum(weights[order]), target, side="left")) + 1
    survivors = order[:kept]
    surviving_weights = weights[survivors]
    weights.fill(0.0)
    weights[survivors] = surviving_weights


def _argmax(logits: torch.Tensor, specs: Sequence[SampleSpec], rows: Sequence[int]) -> list[int]:
    identity = len(rows) == len(logits) and list(rows) == list(range(len(rows)))
    chosen = logits if identity else logits[torch.tensor(rows, device=logits.device)]
    if any(spec.banned_token_ids for spec in specs):
        chosen = chosen.clone()
        for row, spec in zip(chosen, specs, strict=True):
            row[list(spec.banned_token_ids)] = -torch.inf
    values, token_ids = chosen.max(dim=-1)
    on_host = torch.stack((values.double(), token_ids.double())).cpu()  # one copy; token ids are exact in fp64
    if not bool(torch.isfinite(on_host[0]).all()):
        raise EngineFailure("the model's logits are not finite")
    return [int(token_id) for token_id in on_host[1].tolist()]


def _best(logprobs: torch.Tensor, num_top: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
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
