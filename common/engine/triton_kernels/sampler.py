"""From logits to tokens without bringing a row of logits to the host: `sampler` with kernels, one copy back for all tokens.

Rules go onto a copy of the rows that have any (`edit_logits`), draws and greedy choices are one set of launches (`select`), and
log-probabilities are the logits less one number per row (`log_sums`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.engine.batch import SampleSpec
from common.engine.draw_settings import settings_of
from common.engine.sampler import best_logprobs
from common.engine.to_device import to_device
from common.engine.triton_kernels.edit_logits import apply_rules
from common.engine.triton_kernels.log_sums import log_sums
from common.engine.triton_kernels.select import BROKEN, draw_tokens
from common.errors import EngineFailure
from common.types import SampledToken, TokenLogprob


def sample(logits: torch.Tensor, specs: Sequence[SampleSpec], rows: Sequence[int]) -> list[SampledToken]:
    """As `sampler.sample`."""
    ruled = {i: spec.rules for i, spec in enumerate(specs) if spec.rules is not None}
    plain = [i for i in range(len(specs)) if i not in ruled]
    parts: list[torch.Tensor] = []
    if plain:
        parts.append(_draw(logits, [specs[i] for i in plain], [rows[i] for i in plain]))
    if ruled:
        changed = logits.index_select(0, torch.tensor([rows[i] for i in ruled], device=logits.device))
        sound = changed.amax(dim=-1).isfinite()  # before rules hide what is broken; amax passes NaN on
        apply_rules(changed, list(ruled.values()))
        drawn = _draw(changed, [specs[i] for i in ruled], range(len(ruled)))
        parts.append(torch.where(sound, drawn, BROKEN))
    found = torch.cat(parts).tolist()
    if BROKEN in found:
        raise EngineFailure("the model's logits are not finite")
    token_ids = dict(zip([*plain, *ruled], found, strict=True))
    reported = [i for i, spec in enumerate(specs) if spec.logprobs is not None]
    reports: dict[int, TokenLogprob] = {}
    if reported:
        index = torch.tensor([rows[i] for i in reported], device=logits.device)
        told = report_logprobs(
            logits.index_select(0, index), [token_ids[i] for i in reported], [specs[i].logprobs or 0 for i in reported]
        )
        reports = dict(zip(reported, told, strict=True))
    return [SampledToken(token_ids[i], reports.get(i)) for i in range(len(specs))]


def report_logprobs(logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    """As `sampler.report_logprobs`."""
    logprobs = logits - log_sums(logits)[:, None]
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    tops = best_logprobs(logprobs, num_top)
    return [TokenLogprob(*parts) for parts in zip(token_ids, chosen, tops, strict=True)]


def _draw(logits: torch.Tensor, specs: Sequence[SampleSpec], rows: Sequence[int]) -> torch.Tensor:
    drawing = [spec for spec in specs if spec.temperature != 0.0]
    return draw_tokens(
        logits,
        to_device(settings_of(specs, rows), logits.device),
        any_top_k=any(0 < spec.top_k < logits.shape[1] for spec in drawing),
        any_top_p=any(spec.top_p < 1.0 for spec in drawing),
    )
