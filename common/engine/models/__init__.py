"""The model definitions, by family. A definition is imported when a model of that family is built.

tokens, positions -> Model.forward -> hidden rows -> Model.logits, for the rows that need them
                                                  -> TokenPicker.pick, where nothing but the best token is wanted of them
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch

from common.engine.attention import AttentionBackend
from common.engine.automata import Words
from common.engine.kv_pool import KVPool
from common.engine.loader import ModelArchitecture
from common.engine.numerics import Numerics
from common.engine.step_input import StepInput
from common.errors import ModelLoadError

LayerDone = Callable[[int], None]
"""Called with the number of layers whose keys and values of this step are in the pool, once per layer, in order."""


class Model(Protocol):
    def forward(
        self,
        step: StepInput,
        pool: KVPool,
        attention: AttentionBackend,
        layer_done: LayerDone | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes the rows of a step, writes their keys and values, returns their hidden states [rows, hidden]. `rows` are what
        an earlier stage of a pipeline made of them, and may be changed; without, the model begins with its embedding."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 logits [rows, vocab] of hidden rows."""
        ...


@runtime_checkable
class TokenPicker(Protocol):
    """A model that can say what the best tokens are without saying all logits."""

    def pick(self, hidden: torch.Tensor, may_come: Sequence[Words | None]) -> Sequence[int]:
        """The best token of each hidden row, of equal ones the first; -1 where the logits of it are not finite. `may_come` has a
        mask for each row, or None where any token may come."""
        ...


ModelCreator = Callable[[ModelArchitecture, dict[str, torch.Tensor], Numerics, int], Model]


def _llama() -> ModelCreator:
    from common.engine.models.llama import LlamaModel

    return LlamaModel


def _gemma3() -> ModelCreator:
    from common.engine.models.gemma3 import Gemma3Model

    return Gemma3Model


def _qwen3() -> ModelCreator:
    from common.engine.models.qwen3 import Qwen3Model

    return Qwen3Model


_FAMILIES: dict[str, Callable[[], ModelCreator]] = {
    "llama": _llama,
    "gemma3": _gemma3,
    "qwen3": _qwen3,
}


def create_model(
    architecture: ModelArchitecture, weights: dict[str, torch.Tensor], numerics: Numerics, max_model_tokens: int
) -> Model:
    """Builds the model; takes its tensors out of `weights` as it goes, so that fused copies do not double the memory."""
    family = _FAMILIES.get(architecture.family)
    if family is None:
        raise ModelLoadError(f"no model family {architecture.family!r}; known are {', '.join(_FAMILIES)}", param="family")
    return family()(architecture, weights, numerics, max_model_tokens)
