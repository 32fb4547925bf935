"""`Operations` by Triton kernels. One object serves fast and exact mode; they differ in attention alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.engine.batch import SampleSpec
from common.engine.kv_pool import KVPool
from common.engine.layers.rotary import Angles
from common.engine.operations import Norm, RowDraws
from common.engine.triton_kernels import gated, sampler
from common.engine.triton_kernels.add_norm import TritonNorm
from common.engine.triton_kernels.row_draws import TritonRowDraws
from common.engine.triton_kernels.turn_and_store import turn_and_store
from common.errors import EngineFailure
from common.types import SampledToken, TokenLogprob


class TritonOperations:
    def __init__(self, *, exact: bool) -> None:
        self.attention = "paged_exact" if exact else "paged"
        self.row_draws: RowDraws | None = TritonRowDraws()

    def rms_norm(self, weight: torch.Tensor, epsilon: float) -> Norm:
        return TritonNorm(weight, epsilon, offset=False)

    def offset_rms_norm(self, weight: torch.Tensor, epsilon: float) -> Norm:
        return TritonNorm(weight.float() + 1.0, epsilon, offset=True)

    def turn_and_store(
        self,
        heads: torch.Tensor,
        num_heads: int,
        angles: Angles,
        pool: KVPool,
        layer: int,
        write_index: torch.Tensor,
        norms: tuple[Norm, Norm] | None = None,
    ) -> torch.Tensor:
        return turn_and_store(heads, num_heads, angles, pool, layer, write_index, None if norms is None else _own(norms))

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gated.gated_silu(gate_up)

    def gated_gelu(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gated.gated_gelu(gate_up)

    def sample(self, logits: torch.Tensor, specs: Sequence[SampleSpec], rows: Sequence[int]) -> list[SampledToken]:
        return sampler.sample(logits, specs, rows)

    def report_logprobs(self, logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
        return sampler.report_logprobs(logits, token_ids, num_top)


def _own(norms: tuple[Norm, Norm]) -> tuple[TritonNorm, TritonNorm]:
    first, second = norms
    if not isinstance(first, TritonNorm) or not isinstance(second, TritonNorm):
        raise EngineFailure("heads are normed by Triton or by nobody")
    return first, second
