"""Made-up models with made-up KV: what a compiled step is compared on, with torch and with itself, and in which ways it may hold
weights and KV."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from hypothesis import strategies as st

from common.blocks import num_blocks
from common.engine.attention import create_attention
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.block_matrix import BlockKind, BlockMatrix, Weight
from common.engine.cores import Cores, OwnCores
from common.engine.kv_pool import FIRST_BLOCK, NULL_BLOCK, KVPool
from common.engine.loader import Llama3RopeScaling, ModelArchitecture
from common.engine.models import Model, create_model
from common.engine.native.library import Library
from common.engine.native.model import NativeModel
from common.engine.native.panels import ModelPanels
from common.engine.numerics import FastNumerics, Numerics
from common.engine.quantisation import WeightFormat
from common.engine.rounded_rows import round_rows
from common.engine.step_input import StepBuffers
from common.types import KVLayout

CONTEXT = 256


@dataclass(frozen=True)
class Case:
    architecture: ModelArchitecture
    block_tokens: int
    sequences: tuple[tuple[int, int], ...]  # (start, rows)
    seed: int = 0
    beginnings: tuple[tuple[int, int, int], ...] = ()  # (sequence, other, blocks): so many first blocks are the other's


def architecture(
    *, layers: int = 2, hidden: int = 64, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, ffn: int = 96, vocab: int = 130,
    tied: bool = False, biased: bool = False, scaling: Llama3RopeScaling | None = None,
) -> ModelArchitecture:  # fmt: skip
    return ModelArchitecture(
        "llama", layers, hidden, heads, kv_heads, head_dim, ffn, vocab, 10_000.0, scaling, 1e-5, CONTEXT, tied, biased
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.integers(1, 4))
    block_tokens = draw(st.integers(1, 32))
    # Lengths near the borders of blocks, KV tiles and panels, and any others.
    near = st.sampled_from([block_tokens, 2 * block_tokens, 32, 64, 128]).flatmap(
        lambda border: st.integers(border - 1, border + 1)
    )
    start = st.one_of(st.just(0), near, st.integers(0, 150))
    rows = st.one_of(st.just(1), st.integers(1, 40))
    return Case(
        architecture(
            layers=draw(st.integers(1, 2)),
            hidden=draw(st.sampled_from([8, 24, 31, 64, 72, 160])),
            heads=kv_heads * draw(st.sampled_from([1, 2, 3, 7, 30])),
            kv_heads=kv_heads,
            head_dim=draw(st.sampled_from([2, 8, 10, 16, 24, 40, 64, 80, 96, 128])),
            ffn=draw(st.sampled_from([8, 21, 64, 100])),
            vocab=draw(st.sampled_from([33, 64, 100])),
            tied=draw(st.booleans()),
            biased=draw(st.booleans()),
            scaling=draw(st.sampled_from([None, Llama3RopeScaling(8.0, 1.0, 4.0, 64)])),
        ),
        block_tokens,
        tuple(draw(st.lists(st.tuples(start, rows), min_size=1, max_size=6))),
        draw(st.integers(0, 1000)),
    )


class World:
    """Weights, and pools whose sequences have random KV before their first row; every call begins with the same pool."""

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype = torch.float32,
        weight_format: WeightFormat = WeightFormat.MODEL,
        *,
        blocks: BlockKind | None = None,  # of matrices that the native model holds; torch has the same weights in full
        rounded_kv: bool = False,
    ) -> None:
        self.case, self.dtype, self.format = case, dtype, weight_format
        shape, generator = case.architecture, torch.Generator().manual_seed(case.seed)
        self.weights = {
            name: (torch.randn(size, generator=generator) * (1.5 * size[-1] ** -0.5 if len(size) == 2 else 1.0)).to(dtype)
            for name, size in shape.tensor_shapes().items()
        }
        self.stored: dict[str, Weight] = dict(self.weights)
        if blocks is not None:
            for name, weight in self.weights.items():
                if weight.dim() == 2:
                    self.stored[name] = matrix = in_blocks(blocks, weight)
                    self.weights[name] = matrix.dequantised().to(dtype)
        counts = [num_blocks(start + rows, case.block_tokens) for start, rows in case.sequences]
        order = (torch.randperm(sum(counts), generator=generator) + FIRST_BLOCK).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in counts]
        for index, other, blocks in case.beginnings:
            self.tables[index][:blocks] = self.tables[other][:blocks]
        self.tokens = [torch.randint(0, shape.vocab_size, (rows,), generator=generator).tolist() for _, rows in case.sequences]
        name = ("int8-" if rounded_kv else "") + str(dtype).removeprefix("torch.")
        self.layout = KVLayout("", "", shape.num_layers, shape.num_kv_heads, shape.head_dim, case.block_tokens, name, False)
        self.num_blocks = FIRST_BLOCK + sum(counts)
        shape_of_values = (*self.pool().tensor.shape[:-1], shape.head_dim)
        self.memory = torch.randn(shape_of_values, generator=generator).to(dtype)
        if rounded_kv:
            self.memory = round_rows(self.memory)
        self.memory[NULL_BLOCK] = 0

    def pool(self) -> KVPool:
        return KVPool(self.layout, self.num_blocks, torch.device("cpu"))

    def torch_model(self, dtype: torch.dtype | None = None, numerics: Numerics | None = None) -> Model:
        weights = {name: weight.to(dtype or self.dtype) for name, weight in self.weights.items()}
        return create_model(self.case.architecture, weights, numerics or FastNumerics(), CONTEXT)

    def native_model(self, library: Library, pool: KVPool, threads: int = 1, cores: Cores | None = None) -> NativeModel:
        panels = ModelPanels.of(self.case.architecture, self.stored, self.format, self.dtype)
        return NativeModel(library, self.case.architecture, panels, pool, CONTEXT, cores or OwnCores(threads))

    @torch.inference_mode()
    def run(
        self,
        model: Model,
        pool: KVPool,
        steps: list[list[tuple[int, int, int]]] | None = None,
        backend: str = "reference",
    ) -> torch.Tensor:
        """Logits of every row. `steps` may cut the work: lists of (sequence, first, end) in rows of that sequence."""
        pool.tensor.copy_(self.memory)
        whole = [(index, 0, rows) for index, (_, rows) in enumerate(self.case.sequences)]
        attention = create_attention(backend, pool, self.case.architecture.num_heads)
        buffers = StepBuffers(pool)
        found: dict[tuple[int, int], torch.Tensor] = {}
        for shares in steps or [whole]:
            step = buffers.fill(
                ScheduledBatch(
                    tuple(
                        SequenceSlice(self.tokens[index][first:end], self.case.sequences[index][0] + first, self.tables[index])
                        for index, first, end in shares
                    )
                )
            )
            logits = iter(model.logits(model.forward(step, pool, attention)))
            for index, first, end in shares:
                found.update({(index, row): next(logits) for row in range(first, end)})
        return torch.stack([found[key] for key in sorted(found)])


def in_blocks(kind: BlockKind, matrix: torch.Tensor) -> BlockMatrix:
    """As a file would have it, by the gguf package; of matrices whose rows are no whole blocks, nothing but zeros is added."""
    wide = torch.nn.functional.pad(matrix.float(), (0, -matrix.shape[1] % 32))
    return BlockMatrix(kind, torch.from_numpy(quantize(wide.numpy(), GGMLQuantizationType[kind.value])), matrix.shape[1])


BUSY = Case(
    architecture(hidden=72, heads=9, kv_heads=3, head_dim=24, biased=True),
    block_tokens=7,
    sequences=((0, 1), (63, 1), (64, 1), (5, 70), (0, 33), (130, 2), (31, 1), (200, 40)),
)


def one_by_one(case: Case) -> list[list[tuple[int, int, int]]]:
    return [[(index, row, row + 1)] for index, (_, rows) in enumerate(case.sequences) for row in range(rows)]


def in_rounds(case: Case) -> list[list[tuple[int, int, int]]]:
    """All sequences beside each other, thirteen rows of each at a time."""
    longest = max(rows for _, rows in case.sequences)
    return [
        [(i, first, min(first + 13, rows)) for i, (_, rows) in enumerate(case.sequences) if first < rows]
        for first in range(0, longest, 13)
    ]


@dataclass(frozen=True)
class Way:
    """In which weights and KV may be held."""

    format: WeightFormat = WeightFormat.MODEL
    blocks: BlockKind | None = None
    rounded_kv: bool = False

    def world(self, dtype: torch.dtype) -> World:
        return World(BUSY, dtype, self.format, blocks=self.blocks, rounded_kv=self.rounded_kv)


WAYS = {
    "model": Way(),
    "int8": Way(WeightFormat.INT8),
    "int4, int8 KV": Way(WeightFormat.INT4_BLOCKS, rounded_kv=True),
    "int8 KV": Way(rounded_kv=True),
    **{kind.value: Way(WeightFormat.FILE, kind) for kind in BlockKind},
}
