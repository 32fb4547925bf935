"""The Llama family through the native kernels: one call per step, or one per layer if it is long or somebody watches the layers.

Hidden rows are fp32 and padded to whole panels; only `logits` of the same model knows what they are. A row's result is the same
bits whatever the other rows of the step, chunk borders and the number of threads are: its sums run in one order. That holds among
steps of this model, not between it and torch's, and not between machines with different instructions.

A model may be a part of one (`NativeStage`): then a step begins with rows instead of tokens where it is not the first stage, and
is computed by half layers where the sum of a half layer is to be taken over several processes.

The C side holds plain addresses, so this object keeps weights, tables and pool alive and frees the C side when it goes. It is
used by one thread.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from common.engine.attention import AttentionBackend
from common.engine.automata import Words
from common.engine.cores import Cores
from common.engine.kv_pool import KVPool
from common.engine.layers.rotary import RotaryEmbedding
from common.engine.loader import ModelArchitecture
from common.engine.models import LayerDone
from common.engine.native.library import ATTENTION, FEED_FORWARD, STAGES, Description, LayerWeights, Library, Limits, Matrix, Step
from common.engine.native.panels import PANEL, Held, LayerPanels, ModelPanels, Panels
from common.engine.step_input import StepInput
from common.errors import EngineFailure

MAX_HEAD_DIM = 512
_ROWS_BY_LAYER = 64  # from so many rows on a step takes long: how many threads it has is then asked layer by layer


@dataclass(frozen=True, slots=True)
class NativeStage:
    """What is to be known of a part of a model, beyond its own sizes."""

    head_size: int  # outputs of its head
    add_up: Callable[[torch.Tensor], torch.Tensor] | None  # the sum over all parts of fp32 rows; None: this is all of the layer


class NativeModel:
    def __init__(
        self,
        library: Library,
        architecture: ModelArchitecture,
        panels: ModelPanels,
        pool: KVPool,
        max_model_tokens: int,
        cores: Cores,
        stage: NativeStage | None = None,
    ) -> None:
        held, computed = pool.layout, (architecture.num_layers, architecture.num_kv_heads)
        if (held.num_layers, held.num_kv_heads) != computed:
            raise EngineFailure(f"a pool of {held.num_layers} layers of {held.num_kv_heads} heads does not belong to {computed}")
        self._library = library
        self._cores = cores
        self._head_size = architecture.vocab_size if stage is None else stage.head_size
        self._add_up = None if stage is None else stage.add_up
        self._num_layers = architecture.num_layers
        self._panels = panels
        self._hidden_width = -(-architecture.hidden_size // PANEL) * PANEL
        self._pool = pool
        rotary = RotaryEmbedding(
            architecture.head_dim, architecture.rope_theta, architecture.rope_scaling, max_model_tokens, pool.device
        )
        layers = (LayerWeights * architecture.num_layers)(*(_addresses(layer) for layer in panels.layers))
        self._alive = (panels, rotary, layers)
        description = Description(
            bytes_per_value=panels.dtype.itemsize,
            kv_bits=8 if pool.layout.is_rounded else 0,
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
            num_threads=cores.most,
            head_size=self._head_size,
            norm_epsilon=architecture.rms_norm_eps,
            embedding=_matrix(panels.embedding),
            layers=layers,
            final_norm=_address(panels.final_norm),
            head=_matrix(panels.head),
            cosines=rotary.cosines.data_ptr(),
            sines=rotary.sines.data_ptr(),
            pool=pool.tensor.data_ptr(),
        )
        self._handle = library.create(description)
        self._threads = cores.most  # of the calls to come
        # Not at exit: the engine's thread may be within a step then.
        weakref.finalize(self, library.destroy, self._handle).atexit = False

    def forward(
        self,
        step: StepInput,
        pool: KVPool,
        attention: AttentionBackend,
        layer_done: LayerDone | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `Model.forward`. Attention is part of the step: the backend is not asked."""
        if pool is not self._pool:
            raise EngineFailure("a native model computes over the pool that it was made for")
        numbers = step.numbers
        if numbers is None:
            raise EngineFailure("a native model computes what lies on the host")
        hidden = _uninitialised(numbers.num_rows, self._hidden_width) if rows is None else rows
        task = Step(
            num_rows=numbers.num_rows,
            num_sequences=numbers.num_sequences,
            table_width=numbers.width,
            token_ids=numbers.address,
            positions=numbers.address_of(numbers.num_rows),
            first_rows=numbers.address_of(numbers.first_rows_at),
            tables=numbers.address_of(numbers.tables_at),
            hidden=hidden.data_ptr(),
            first_layer=0,
            end_layer=self._num_layers,
            embeds=rows is None,
            halves=ATTENTION | FEED_FORWARD,
            partial=None,
        )
        if layer_done is None and self._add_up is None and numbers.num_rows < _ROWS_BY_LAYER:
            self._compute(task)
            return hidden
        for number in range(1, self._num_layers + 1):
            task.first_layer, task.end_layer = number - 1, number
            if self._add_up is None:
                self._compute(task)
            else:
                self._by_halves(task, hidden, self._add_up)
            task.embeds = False
            if layer_done is not None:
                layer_done(number)
        return hidden

    def _by_halves(self, task: Step, hidden: torch.Tensor, add_up: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for half in (ATTENTION, FEED_FORWARD):
            partial = torch.empty_like(hidden)
            task.halves, task.partial = half, partial.data_ptr()
            self._compute(task)
            task.embeds = False
            hidden.add_(add_up(partial))

    def _compute(self, task: Step) -> None:
        with self._cores.computing(task.num_rows) as threads:
            self._use_threads(threads)
            self._library.forward(self._handle, task)

    def _use_threads(self, threads: int) -> None:
        # A call gives the interpreter's lock away, and a thread that works masks out would keep it for a while.
        if threads != self._threads:
            self._library.use_threads(self._handle, threads)
            self._threads = threads

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.contiguous()
        logits = torch.empty(len(hidden), self._head_size)
        if len(hidden):
            with self._cores.computing(len(hidden)) as threads:
                self._use_threads(threads)
                self._library.logits(self._handle, hidden.data_ptr(), len(hidden), logits.data_ptr())
        return logits

    def pick(self, hidden: torch.Tensor, may_come: Sequence[Words | None]) -> Sequence[int]:
        """As `TokenPicker.pick`. Not of a part of a model."""
        hidden = hidden.contiguous()
        bits = [None if words is None else words.__array_interface__["data"][0] for words in may_come]
        with self._cores.computing(len(bits)) as threads:
            self._use_threads(threads)
            return self._library.pick(self._handle, hidden.data_ptr(), bits)

    def watch(self) -> Mapping[str, float]:
        """Seconds of each stage from now on, as they add up."""
        seconds = np.zeros(len(STAGES))
        self._watched = seconds
        self._library.watch(self._handle, seconds.ctypes.data)
        return _Seconds(seconds)

    def limits(self) -> Limits:
        """Of this machine, with this model's threads. Takes a moment."""
        return self._library.limits(self._handle)

    def matrix_bytes(self) -> dict[str, float]:
        """What reading all matrices of a stage comes to."""
        layers, head = self._panels.layers, self._panels.head

        def total(matrices: Iterable[Panels]) -> float:
            return float(sum(matrix.words.nbytes for matrix in matrices))

        return {
            "qkv": total(layer.qkv for layer in layers),
            "output": total(layer.output for layer in layers),
            "gate, up": total(layer.gate_up for layer in layers),
            "down": total(layer.down for layer in layers),
            "head": total([] if head is None else [head]),
        }

    @property
    def computes_rounded(self) -> bool:
        """Whether its products are of 8-bit integers."""
        return any(layer.gate_up.held is not Held.PLAIN for layer in self._panels.layers)


class _Seconds(Mapping[str, float]):
    def __init__(self, seconds: npt.NDArray[np.float64]) -> None:
        self._seconds = seconds

    def __getitem__(self, stage: str) -> float:
        return float(self._seconds[STAGES.index(stage)])

    def __iter__(self) -> Iterator[str]:
        return iter(STAGES)

    def __len__(self) -> int:
        return len(STAGES)


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _matrix(panels: Panels | None) -> Matrix:
    return Matrix(None, Held.PLAIN) if panels is None else Matrix(panels.words.data_ptr(), panels.held)


def _uninitialised(rows: int, width: int) -> torch.Tensor:
    """By numpy, for `torch.empty` gives the interpreter's lock away."""
    return torch.from_numpy(np.empty((rows, width), dtype=np.float32))


def _addresses(layer: LayerPanels) -> LayerWeights:
    return LayerWeights(
        attention_norm=_address(layer.attention_norm),
        qkv=_matrix(layer.qkv),
        qkv_bias=_address(layer.qkv_bias),
        output=_matrix(layer.output),
        output_bias=_address(layer.output_bias),
        mlp_norm=_address(layer.mlp_norm),
        gate_up=_matrix(layer.gate_up),
        down=_matrix(layer.down),
    )
