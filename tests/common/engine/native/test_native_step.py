"""The compiled step against torch with the fp64 attention reference on made-up models, and bit by bit against itself."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.blocks import num_blocks
from common.config import pdserve_home
from common.engine.attention import create_attention
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.block_matrix import BlockKind, BlockMatrix, Weight
from common.engine.cores import Cores, OwnCores
from common.engine.kv_pool import FIRST_BLOCK, NULL_BLOCK, KVPool
from common.engine.loader import Llama3RopeScaling, ModelArchitecture
from common.engine.models import Model, create_model
from common.engine.native.build import build_library
from common.engine.native.check import check_library
from common.engine.native.library import Library
from common.engine.native.model import NativeModel
from common.engine.native.panels import ModelPanels
from common.engine.numerics import FastNumerics, Numerics
from common.engine.packed_matrix import Product
from common.engine.quantisation import WeightFormat
from common.engine.rounded_rows import round_rows
from common.engine.step_input import StepBuffers
from common.errors import EngineFailure
from common.types import KVLayout

CONTEXT = 256


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(build_library(pdserve_home() / "kernels", check_library))


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


def values_of(pool: KVPool) -> torch.Tensor:
    """Of a pool whose rows may be rounded: byte by byte as `KVLayout` states it."""
    if not pool.layout.is_rounded:
        return pool.tensor
    scales = pool.tensor[..., -4:].contiguous().view(torch.float32)
    return pool.tensor[..., : pool.layout.head_dim].float() * scales


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert torch.isfinite(got).all()
    assert float((got - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_native_is_torch_in_float32(library: Library, case: Case) -> None:
    world = World(case)
    torch_pool, native_pool = world.pool(), world.pool()
    expected = world.run(world.torch_model(), torch_pool)
    got = world.run(world.native_model(library, native_pool), native_pool)
    assert_near(got, expected, 1e-4)
    assert_near(native_pool.tensor, torch_pool.tensor, 1e-4)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_native_bfloat16_is_no_further_from_the_truth_than_torch(library: Library, case: Case) -> None:
    """The truth: fp64 attention and fp32 arithmetic with the same weights, which bf16 holds exactly. Of several models, with 64
    rows together, for in a few rows a single rounding that falls the other way decides: of 240 models of one row, the native
    step's error is 0.7 of torch's on the whole, and larger in every fifth."""
    num_models = max(4, 64 // sum(rows for _, rows in case.sequences))
    squares = torch.zeros(2, 2)  # logits, KV; of torch, native
    for seed in range(case.seed, case.seed + num_models):
        world, wide = World(replace(case, seed=seed), torch.bfloat16), World(replace(case, seed=seed))
        wide.weights = {name: weight.float() for name, weight in world.weights.items()}
        wide.memory = world.memory.float()
        wide_pool, torch_pool, native_pool = wide.pool(), world.pool(), world.pool()
        truth = wide.run(wide.torch_model(), wide_pool)
        by_torch = world.run(world.torch_model(), torch_pool)
        by_native = world.run(world.native_model(library, native_pool), native_pool)
        squares[0] += torch.stack([(logits - truth).square().mean() for logits in (by_torch, by_native)])
        squares[1] += torch.stack([(pool.tensor - wide_pool.tensor).square().mean() for pool in (torch_pool, native_pool)])
    (torch_logits, native_logits), (torch_kv, native_kv) = (squares / num_models).sqrt()
    assert native_logits <= 1.3 * torch_logits + 1e-2
    assert native_kv <= 1.3 * torch_kv + 1e-3


def in_eight_bits(values: torch.Tensor, run: int = 64) -> torch.Tensor:
    """Each run of values of a row rounded to 255 steps of its own: written down anew, in fp64."""
    width = values.shape[-1]
    runs = torch.nn.functional.pad(values.double(), (0, -width % run)).unflatten(-1, (-1, run))
    steps = runs.abs().amax(dim=-1, keepdim=True) / 127
    return torch.where(steps > 0, (runs / steps).round() * steps, runs).flatten(-2)[..., :width]


class EightBits(FastNumerics):
    """The plainest products of rounded rows and rounded weights."""

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        rounded = in_eight_bits(weight)

        def product(rows: torch.Tensor) -> torch.Tensor:
            return (in_eight_bits(rows) @ rounded.T).float() + (0 if bias is None else bias.float())

        return product


def widened(case: Case) -> Case:
    made = case.architecture
    wide = replace(
        made,
        hidden_size=made.hidden_size + 64,
        ffn_size=made.ffn_size + 64,
        head_dim=made.head_dim + 64 // made.num_heads // 2 * 2,
    )
    return replace(case, architecture=wide, sequences=((0, 16), *case.sequences[1:]))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases().map(widened))
def test_eight_bits_are_rounded_as_they_should_be(library: Library, case: Case) -> None:
    """Near the plain products, compared with what rounding itself costs: a value in the middle may be rounded either way, which
    is up to 0.6 of what rounding costs; other runs or steps than these would be 1.4 of it."""
    world = World(case, weight_format=WeightFormat.INT8)
    plain_pool, rounded_pool, native_pool = world.pool(), world.pool(), world.pool()
    plain = world.run(world.torch_model(), plain_pool)
    rounded = world.run(world.torch_model(numerics=EightBits()), rounded_pool)
    got = world.run(world.native_model(library, native_pool), native_pool)
    assert torch.isfinite(got).all()

    def error(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).square().mean().sqrt())

    assert error(got, rounded) <= 0.9 * error(plain, rounded) + 1e-3
    assert error(native_pool.tensor, rounded_pool.tensor) <= 0.9 * error(plain_pool.tensor, rounded_pool.tensor) + 1e-3


class RowsInEightBits(FastNumerics):
    """The plainest products of rounded rows, 32 values to a scale, and weights as they are given."""

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        def product(rows: torch.Tensor) -> torch.Tensor:
            return (in_eight_bits(rows, 32) @ weight.double().T).float() + (0 if bias is None else bias.float())

        return product

    def plain_linear(self, weight: torch.Tensor) -> Product:
        return self.linear(weight, None)


@pytest.mark.parametrize("kind", BlockKind)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases().map(widened))
def test_blocks_of_a_file_are_multiplied_by_rounded_rows(library: Library, case: Case, kind: BlockKind) -> None:
    """As above: other weights than the file's, or other runs, would be further away."""
    world = World(case, weight_format=WeightFormat.FILE, blocks=kind)
    plain_pool, rounded_pool, native_pool = world.pool(), world.pool(), world.pool()
    plain = world.run(world.torch_model(), plain_pool)
    rounded = world.run(world.torch_model(numerics=RowsInEightBits()), rounded_pool)
    got = world.run(world.native_model(library, native_pool), native_pool)
    assert torch.isfinite(got).all()

    def error(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).square().mean().sqrt())

    assert error(got, rounded) <= 0.9 * error(plain, rounded) + 1e-3
    assert error(native_pool.tensor, rounded_pool.tensor) <= 0.9 * error(plain_pool.tensor, rounded_pool.tensor) + 1e-3


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_rounded_keys_and_values_are_those_of_torch(library: Library, case: Case) -> None:
    """Rows that both rounded alike, but for values in the middle between two steps."""
    world = World(case, rounded_kv=True)
    torch_pool, native_pool = world.pool(), world.pool()
    expected = world.run(world.torch_model(), torch_pool)
    got = world.run(world.native_model(library, native_pool), native_pool)
    assert_near(got, expected, 0.05)
    values, by_torch = values_of(native_pool), values_of(torch_pool)
    scales = torch_pool.tensor[..., -4:].contiguous().view(torch.float32)
    assert ((values - by_torch).abs() <= 1.01 * scales + 1e-4).all()
    assert float((values - by_torch).square().mean().sqrt()) <= 0.1 * float(scales.square().mean().sqrt()) + 1e-4
    assert not native_pool.tensor[NULL_BLOCK].any()


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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_bits_in_any_company(library: Library, dtype: torch.dtype, way: str) -> None:
    world = WAYS[way].world(dtype)
    pool = world.pool()
    model = world.native_model(library, pool)
    expected, memory = world.run(model, pool), pool.tensor.clone()
    for steps in (one_by_one(BUSY), in_rounds(BUSY)):
        assert torch.equal(world.run(model, pool, steps), expected)
        # What lies behind a sequence's end in its last block is cleared when a step enters the block, whichever step that is.
        assert torch.equal(pool.tensor, memory)


@st.composite
def families(draw: st.DrawFn) -> Case:
    """Sequences of few rows, mostly, of which many begin with blocks of an earlier one."""
    block_tokens = draw(st.sampled_from([1, 7, 16, 32, 64, 100]))
    sequences = draw(
        st.lists(st.tuples(st.integers(0, 210), st.sampled_from([1, 1, 1, 2, 5, 40])), min_size=2, max_size=12).map(tuple)
    )
    beginnings = []
    for index in range(1, len(sequences)):
        other = draw(st.integers(0, index - 1))
        most = min(sequences[index][0], sequences[other][0]) // block_tokens
        beginnings.append((index, other, draw(st.one_of(st.just(most), st.integers(0, most)))))
    kv_heads = draw(st.integers(1, 2))
    heads = kv_heads * draw(st.sampled_from([1, 3, 8, 40]))
    shape = architecture(heads=heads, kv_heads=kv_heads, head_dim=draw(st.sampled_from([10, 64])))
    return Case(shape, block_tokens, sequences, draw(st.integers(0, 1000)), tuple(beginnings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=families(), rounded_kv=st.booleans(), threads=st.integers(1, 3))
def test_who_shares_a_beginning_gets_the_same_bits_as_alone(
    library: Library, dtype: torch.dtype, case: Case, rounded_kv: bool, threads: int
) -> None:
    world = World(case, dtype, rounded_kv=rounded_kv)
    pool = world.pool()
    expected, memory = world.run(world.native_model(library, pool), pool, one_by_one(case)), pool.tensor.clone()
    assert torch.equal(world.run(world.native_model(library, pool, threads), pool), expected)
    assert torch.equal(pool.tensor, memory)


@st.composite
def cut_anyhow(draw: st.DrawFn) -> tuple[Case, list[list[tuple[int, int, int]]]]:
    """A case, and steps that compute each of its rows once: any chunks, in any company, at any place of the batch."""
    case = draw(cases())
    done = [0] * len(case.sequences)
    steps = []
    while left := [index for index, (_, rows) in enumerate(case.sequences) if done[index] < rows]:
        chosen = draw(st.lists(st.sampled_from(left), min_size=1, unique=True))
        shares = []
        for index in chosen:
            rest = case.sequences[index][1] - done[index]
            count = draw(st.one_of(st.just(1), st.integers(1, rest), st.just(rest)))
            shares.append((index, done[index], done[index] + count))
            done[index] += count
        steps.append(shares)
    return case, steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    work=cut_anyhow(),
    format=st.sampled_from([WeightFormat.MODEL, WeightFormat.INT8, WeightFormat.INT4_BLOCKS]),
    rounded_kv=st.booleans(),
    threads=st.integers(1, 2),
)
def test_a_row_is_the_same_bits_however_work_is_cut(
    library: Library,
    dtype: torch.dtype,
    work: tuple[Case, list[list[tuple[int, int, int]]]],
    format: WeightFormat,
    rounded_kv: bool,
    threads: int,
) -> None:
    """What exact mode rests on, for any shape of model."""
    case, steps = work
    world = World(case, dtype, format, rounded_kv=rounded_kv)
    pool = world.pool()
    expected, memory = world.run(world.native_model(library, pool), pool), pool.tensor.clone()
    model = world.native_model(library, pool, threads)
    assert torch.equal(world.run(model, pool, steps), expected)
    assert torch.equal(pool.tensor, memory)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_change_no_bit(library: Library, threads: int, way: str) -> None:
    world = WAYS[way].world(torch.bfloat16)
    pool = world.pool()
    expected = world.run(world.native_model(library, pool), pool)
    memory = pool.tensor.clone()
    model = world.native_model(library, pool, threads)
    for _ in range(5):
        assert torch.equal(world.run(model, pool), expected)
        assert torch.equal(pool.tensor, memory)


@pytest.mark.parametrize("way", WAYS)
def test_threads_change_no_bit_of_steps_of_few_rows(library: Library, way: str) -> None:
    """Of which each thread prepares the rows for itself: one to five at a time, of one sequence and of several."""
    world = WAYS[way].world(torch.bfloat16)
    pool = world.pool()
    expected = world.run(world.native_model(library, pool), pool)
    memory = pool.tensor.clone()
    firsts = [(index, first) for index, (_, rows) in enumerate(world.case.sequences) for first in range(rows)]
    singles = [(index, first, first + 1) for index, first in sorted(firsts, key=lambda place: place[1])]
    for most, threads in itertools.product((1, 2, 4, 5), (2, 8)):
        steps: list[list[tuple[int, int, int]]] = [[]]
        for index, first, end in singles:
            step = steps[-1]
            if len(step) == most or any(index == other for other, _, _ in step):
                steps.append([])
            steps[-1].append((index, first, end))
        assert torch.equal(world.run(world.native_model(library, pool, threads), pool, steps), expected)
        assert torch.equal(pool.tensor, memory)
    rows_of = [
        (index, first, min(first + 4, rows))
        for index, (_, rows) in enumerate(world.case.sequences)
        for first in range(0, rows, 4)
    ]
    assert torch.equal(world.run(world.native_model(library, pool, 8), pool, [[share] for share in rows_of]), expected)
    assert torch.equal(pool.tensor, memory)


def test_the_bitwise_comparison_can_fail(library: Library) -> None:
    """Torch's own arithmetic gives a row other bits when it stands alone."""
    world = World(BUSY)
    pool = world.pool()
    model = world.torch_model()
    together = world.run(model, pool, backend="fast")
    assert not torch.equal(world.run(model, pool, one_by_one(BUSY), backend="fast"), together)


def test_threads_sleep_between_steps(library: Library) -> None:
    """Counted in time on a core, which other processes do not change: three spinning threads would take three times the wait."""
    world = World(BUSY)
    pool = world.pool()
    model = world.native_model(library, pool, threads=4)
    world.run(model, pool)
    before = time.process_time()
    threading.Event().wait(0.5)
    assert time.process_time() - before < 0.2


class InTurn:
    """Another number of threads for each call."""

    most = 4

    def __init__(self) -> None:
        self._numbers = itertools.cycle((3, 1, 4, 2, 9))

    @contextmanager
    def computing(self, num_rows: int) -> Iterator[int]:
        yield next(self._numbers)


def test_the_number_of_threads_may_change_between_calls_and_changes_no_bit(library: Library) -> None:
    world = World(BUSY)
    expected = world.run(world.native_model(library, pool := world.pool()), pool)
    model = world.native_model(library, pool := world.pool(), cores=InTurn())
    for _ in range(40):
        pool.tensor.copy_(world.memory)
        assert torch.equal(world.run(model, pool), expected)


def test_layers_are_reported_in_order_and_the_result_is_the_same(library: Library) -> None:
    world = World(BUSY)
    pool = world.pool()
    model = world.native_model(library, pool)
    expected = world.run(model, pool)
    pool.tensor.copy_(world.memory)
    step = StepBuffers(pool).fill(
        ScheduledBatch(
            tuple(
                SequenceSlice(tokens, start, table)
                for tokens, (start, _), table in zip(world.tokens, BUSY.sequences, world.tables, strict=True)
            )
        )
    )
    written: list[tuple[int, bool, bool]] = []

    def layer_done(count: int) -> None:
        changed = (pool.tensor != world.memory).flatten(2).any(2).any(0)
        written.append((count, bool(changed[count - 1]), bool(changed[count:].any())))

    hidden = model.forward(step, pool, create_attention("reference", pool, 9), layer_done)
    assert written == [(1, True, False), (2, True, False)]
    assert torch.equal(model.logits(hidden), expected)


@pytest.mark.parametrize("wrong", ["token", "negative token", "position", "block"])
def test_what_does_not_exist_is_refused(library: Library, wrong: str) -> None:
    world = World(Case(architecture(), 16, ((0, 3),)))
    pool = world.pool()
    model = world.native_model(library, pool)
    token = {"token": 130, "negative token": -1}.get(wrong, 5)
    start = CONTEXT - 2 if wrong == "position" else 0
    table = [world.num_blocks if wrong == "block" else world.tables[0][0]] * 16 if wrong != "token" else world.tables[0]
    step = StepBuffers(pool).fill(ScheduledBatch((SequenceSlice([3, token, 4], start, [*table, 0]),)))
    with pytest.raises(EngineFailure, match="does not have"):
        model.forward(step, pool, create_attention("reference", pool, 4))


def test_another_pool_is_refused(library: Library) -> None:
    world = World(Case(architecture(), 16, ((0, 3),)))
    pool = world.pool()
    model = world.native_model(library, pool)
    with pytest.raises(EngineFailure, match="pool"):
        world.run(model, world.pool())


@pytest.mark.parametrize("other", [architecture(layers=1), architecture(heads=4, kv_heads=1)], ids=["layers", "heads"])
def test_a_pool_of_another_shape_is_refused(library: Library, other: ModelArchitecture) -> None:
    world, smaller = World(Case(architecture(), 16, ((0, 3),))), World(Case(other, 16, ((0, 3),)))
    with pytest.raises(EngineFailure, match="does not belong"):
        world.native_model(library, smaller.pool())


@pytest.mark.parametrize("way", WAYS)
def test_broken_memory_shows(library: Library, way: str) -> None:
    """A NaN in a key or a value that a row sees reaches its logits; one behind its end does not. In a rounded row it is its step
    that may be none."""
    case = Case(architecture(), 16, ((40, 1),))
    for dtype in (torch.float32, torch.bfloat16):
        world = World(case, dtype, WAYS[way].format, blocks=WAYS[way].blocks, rounded_kv=WAYS[way].rounded_kv)
        pool = world.pool()
        model = world.native_model(library, pool)
        memory = world.memory
        if WAYS[way].rounded_kv:
            memory = memory.view(torch.float32)  # of which the last of a row is its step
        for half in (0, 1):
            whole = memory[world.tables[0][1], 1, 1, half, 3, -1].clone()
            memory[world.tables[0][1], 1, 1, half, 3, -1] = torch.nan
            assert not torch.isfinite(world.run(model, pool)).all()
            memory[world.tables[0][1], 1, 1, half, 3, -1] = whole
            memory[world.tables[0][2], :, :, half, 9:] = torch.nan
            assert torch.isfinite(world.run(model, pool)).all()


@pytest.mark.long
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names x86 instruction sets")
@pytest.mark.parametrize("instructions", ["x86-64", "x86-64-v3"])
def test_narrower_machines_compute_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instructions: str) -> None:
    from common.engine.native import build

    flags = tuple(f"-march={instructions}" if flag == "-march=native" else flag for flag in build._FLAGS)
    monkeypatch.setattr(build, "_FLAGS", flags)
    narrow = Library(build_library(tmp_path, check_library))
    for dtype, weight_format, tolerance in (
        (torch.float32, WeightFormat.MODEL, 1e-4),
        (torch.bfloat16, WeightFormat.MODEL, 0.1),
        (torch.float32, WeightFormat.INT8, 0.05),
        (torch.float32, WeightFormat.FILE, 0.05),
    ):
        blocks = BlockKind.Q4_MINIMA if weight_format is WeightFormat.FILE else None
        world = World(BUSY, dtype, weight_format, blocks=blocks, rounded_kv=blocks is not None)
        torch_pool, pool = world.pool(), world.pool()
        numerics = {WeightFormat.INT8: EightBits(), WeightFormat.FILE: RowsInEightBits()}.get(weight_format)
        expected = world.run(world.torch_model(numerics=numerics), torch_pool)
        model = world.native_model(narrow, pool)
        got = world.run(model, pool)
        assert_near(got, expected, tolerance)
        assert torch.equal(world.run(model, pool, one_by_one(BUSY)), got)
