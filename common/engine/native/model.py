"""The Llama family through the native kernels: one call per step, or one per layer if somebody watches the layers.

Hidden rows are fp32 and padded to whole panels; only `logits` of the same model knows what they are. A row's result is the same
bits whatever the other rows of the step, chunk borders and the number of threads are: its sums run in one order. That holds among
steps of this model, not between it and torch's, and not between machines with different instructions.

The C side holds plain addresses, so this object keeps weights, tables and pool alive and frees the C side when it goes. It is
used by one thread.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch

from common.engine.attention import AttentionBackend
from common.engine.kv_pool import KVPool
from common.engine.layers.rotary import RotaryEmbedding
from common.engine.loader import ModelArchitecture
from common.engine.models import LayerDone
from common.engine.native.library import Description, LayerWeights, Library, Step
from common.engine.native.panels import PANEL, LayerPanels, ModelPanels
from common.engine.quantisation import WeightFormat
from common.engine.step_input import StepInput
from common.errors import EngineFailure

MAX_HEAD_DIM = 512


class NativeModel:
    def __init__(
        self,
        library: Library,
        architecture: ModelArchitecture,
        panels: ModelPanels,
        pool: KVPool,
        max_model_tokens: int,
        threads: int,
    ) -> None:
        self._library = library
        self._num_layers = architecture.num_layers
        self._vocab_size = architecture.vocab_size
        self._hidden_width = -(-architecture.hidden_size // PANEL) * PANEL
        self._pool = pool
        rotary = RotaryEmbedding(
            architecture.head_dim, architecture.rope_theta, architecture.rope_scaling, max_model_tokens, pool.device
        )
        layers = (LayerWeights * architecture.num_layers)(*(_addresses(layer) for layer in panels.layers))
        self._alive = (panels, rotary, layers)
        description = Description(
            bytes_per_value=panels.embedding.element_size(),
            weight_bits=8 if panels.format is WeightFormat.INT8 else 0,
            num_layers=architecture.num_layers,
            hidden_size=architecture.hidden_size,
            num_heads=architecture.num_heads,
            num_kv_heads=architecture.num_kv_heads,
            head_dim=architecture.head_dim,
            ffn_size=architecture.ffn_size,
            vocab_size=architecture.vocab_size,
            num_positions=max_model_tokens,
            block_tokens=pool.layout.block_tokens,
            num_blocks=pool.num_blocks,
            num_threads=threads,
            norm_epsilon=architecture.rms_norm_eps,
            embedding=panels.embedding.data_ptr(),
            layers=layers,
            final_norm=panels.final_norm.data_ptr(),
            head=panels.head.data_ptr(),
            cosines=rotary.cosines.data_ptr(),
            sines=rotary.sines.data_ptr(),
            pool=pool.tensor.data_ptr(),
        )
        self._handle = library.create(description)
        # Not at exit: the engine's thread may be within a step then.
        weakref.finalize(self, library.destroy, self._handle).atexit = False

    def forward(
        self, step: StepInput, pool: KVPool, attention: AttentionBackend, layer_done: LayerDone | None = None
    ) -> torch.Tensor:
        """As `Model.forward`. Attention is part of the step: the backend is not asked."""
        if pool is not self._pool:
            raise EngineFailure("a native model computes over the pool that it was made for")
        hidden = torch.empty(len(step.token_ids), self._hidden_width)
        first_rows = np.array([*(span.first_row for span in step.spans), len(step.token_ids)], dtype=np.int64)
        task = Step(
            num_rows=len(step.token_ids),
            num_sequences=len(step.spans),
            table_width=step.block_tables.shape[1],
            token_ids=step.token_ids.data_ptr(),
            positions=step.positions.data_ptr(),
            first_rows=first_rows.ctypes.data,
            tables=step.block_tables.data_ptr(),
            hidden=hidden.data_ptr(),
            first_layer=0,
            end_layer=self._num_layers,
        )
        if layer_done is None:
            self._library.forward(self._handle, task)
            return hidden
        for number in range(1, self._num_layers + 1):
            task.first_layer, task.end_layer = number - 1, number
            self._library.forward(self._handle, task)
            layer_done(number)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.contiguous()
        logits = torch.empty(len(hidden), self._vocab_size)
        if len(hidden):
            self._library.logits(self._handle, hidden.data_ptr(), len(hidden), logits.data_ptr())
        return logits


def _addresses(layer: LayerPanels) -> LayerWeights:
    def address(tensor: torch.Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    return LayerWeights(
        attention_norm=address(layer.attention_norm),
        qkv=address(layer.qkv),
        qkv_bias=address(layer.qkv_bias),
        output=address(layer.output),
        output_bias=address(layer.output_bias),
        mlp_norm=address(layer.mlp_norm),
        gate_up=address(layer.gate_up),
        down=address(layer.down),
    )
