"""What a decoder does to each row by itself, besides matrix products: norms, turning and storing heads, activations, draws.

    TorchOperations                           torch, one operation after the other; everywhere
    triton_kernels.operations                 fused kernels; on a GPU, or in Triton's interpreter

`Numerics` holds one of them and decides what is left, the matrix products. Layers ask for an operation when they are built, so
that who computes is settled once. Any of them may serve exact mode if a row's bits do not depend on its batch; attention, of
which that is not true by itself, is named here and made by `common.engine.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from common.engine.batch import SampleSpec
from common.engine.kv_pool import KVPool
from common.engine.layers.activation import gated_gelu, gated_silu, stepwise_gated_gelu, stepwise_gated_silu
from common.engine.layers.norm import OffsetRMSNorm, RMSNorm
from common.engine.layers.rotary import Angles, turn_and_store
from common.engine.sampler import report_logprobs, sample
from common.types import SampledToken, TokenLogprob


class Norm(Protocol):
    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """The norm of each row, over its last dimension."""
        ...

    def add(
        self, rows: torch.Tensor, added: torch.Tensor, first: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Adds to `rows`, in place, and returns the norm of the sum; with `first`, what is added is the norm by that one."""
        ...


class RowDraws(Protocol):
    """Draws by numbers that lie on the device, in launches that do not depend on them: what can be captured."""

    def edit(self, logits: torch.Tensor, edits: torch.Tensor) -> None:
        """Changes single logits in place, as `logit_edits` say; these lie in the beginning of `edits`, int32."""
        ...

    def draw(self, logits: torch.Tensor, settings: torch.Tensor, *, any_top_k: bool, any_top_p: bool) -> torch.Tensor:
        """A token id for each of the `draw_settings` [rows, 8], int64, below 0 where the logits are no numbers: the tokens that
        `sampler.sample` draws. `any_top_k` and `any_top_p` say whether any of them filters by that."""
        ...


class Operations(Protocol):
    @property
    def attention(self) -> str:
        """The attention backend that goes with them (`common.engine.attention`)."""
        ...

    @property
    def row_draws(self) -> RowDraws | None:
        """None if only `sample` draws, which wants to know on the host what it does."""
        ...

    def rms_norm(self, weight: torch.Tensor, epsilon: float) -> Norm:
        """Llama's norm (`layers.norm`); called when a model is built."""
        ...

    def offset_rms_norm(self, weight: torch.Tensor, epsilon: float) -> Norm:
        """Gemma's norm; called when a model is built."""
        ...

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
        """Of heads `[rows, queries | keys | values, head_dim]`, norms (if there are any: of queries, of keys) and turns queries
        and keys, stores keys and values at a `KVPool.write_index`, and returns the queries."""
        ...

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up` of rows `[n, gate | up]`."""
        ...

    def gated_gelu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`gelu(gate) * up` of rows `[n, gate | up]`, gelu in its approximation by tanh."""
        ...

    def sample(self, logits: torch.Tensor, specs: Sequence[SampleSpec], rows: Sequence[int]) -> list[SampledToken]:
        """As `sampler.sample`."""
        ...

    def report_logprobs(self, logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
        """As `sampler.report_logprobs`."""
        ...


@dataclass(frozen=True, slots=True)
class TorchOperations:
    attention: str
    gated_silu: Callable[[torch.Tensor], torch.Tensor]
    gated_gelu: Callable[[torch.Tensor], torch.Tensor]

    @property
    def row_draws(self) -> RowDraws | None:
        return None

    @classmethod
    def fast(cls) -> TorchOperations:
        return cls("fast", gated_silu, gated_gelu)

    @classmethod
    def exact(cls) -> TorchOperations:
        """A row's bits depend on that row alone."""
        return cls("tiled", stepwise_gated_silu, stepwise_gated_gelu)

    def rms_norm(self, weight: torch.Tensor, epsilon: float) -> Norm:
        return RMSNorm(weight, epsilon)

    def offset_rms_norm(self, weight: torch.Tensor, epsilon: float) -> Norm:
        return OffsetRMSNorm(weight, epsilon)

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
        return turn_and_store(heads, num_heads, angles, pool, layer, write_index, norms)

    def sample(self, logits: torch.Tensor, specs: Sequence[SampleSpec], rows: Sequence[int]) -> list[SampledToken]:
        return sample(logits, specs, rows)

    def report_logprobs(self, logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
        return report_logprobs(logits, token_ids, num_top)
