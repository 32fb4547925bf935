"""Draws of a step's rows by settings and edits that lie on the device (`operations.RowDraws`): what a captured step ends with."""

from __future__ import annotations

import torch

from common.engine import logit_edits
from common.engine.triton_kernels.edit_logits import apply_edits
from common.engine.triton_kernels.select import draw_tokens


class TritonRowDraws:
    def edit(self, logits: torch.Tensor, edits: torch.Tensor) -> None:
        words = len(edits) - logit_edits.HEADER_WORDS
        most = (words // logit_edits.BIAS_WORDS, words // logit_edits.PENALTY_WORDS, words // logit_edits.BAN_WORDS)
        apply_edits(logits, edits, most)

    def draw(self, logits: torch.Tensor, settings: torch.Tensor, *, any_top_k: bool, any_top_p: bool) -> torch.Tensor:
        return draw_tokens(logits, settings, any_top_k=any_top_k, any_top_p=any_top_p)
