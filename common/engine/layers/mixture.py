"""A mixture of experts: a router chooses a few feed-forward parts for each row, and their weighted answers are added up.

    scores = softmax(router(row))                  over all experts, in fp32
    answer = sum of scores[e] * expert e (row)     over the best few; the scores may be scaled so that theirs add up to 1

How the experts compute is `Numerics.experts`; this knows who is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.engine.layers.linear import PlainLinear
from common.engine.numerics import Numerics


class Mixture:
    def __init__(
        self,
        numerics: Numerics,
        router: torch.Tensor,
        experts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],  # gate, up, down
        experts_per_token: int,
        *,
        normalise: bool,
    ) -> None:
        self._router = PlainLinear(numerics, router)
        gate_up = torch.stack([torch.cat((gate, up)) for gate, up, _ in experts])
        self._experts = numerics.experts(gate_up, torch.stack([down for *_, down in experts]))
        self._experts_per_token = experts_per_token
        self._normalise = normalise

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        scores = self._router(rows).float().softmax(dim=-1)
        weights, expert_ids = scores.topk(self._experts_per_token, dim=-1)
        if self._normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return self._experts(rows, expert_ids, weights.to(rows.dtype).float())
