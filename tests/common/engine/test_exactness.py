"""Exact mode: logits and KV are bitwise the same however they are computed. `torch.equal` throughout, fp32 and bf16."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from common.blocks import num_blocks
from common.config import EngineConfig
from common.engine.batch import SampleSpec, ScheduledBatch, SequenceSlice
from common.engine.engine import Engine, build_engine
from common.engine.exact import ExactNumerics
from common.engine.exactness_check import check_exactness
from common.engine.layers.norm import RMSNorm
from common.engine.layers.rotary import RotaryEmbedding
from common.engine.loader import load_weights
from common.engine.models import create_model
from common.engine.native.model import NativeModel
from common.engine.numerics import FastNumerics
from common.engine.packed_matrix import Product
from common.engine.runner import ModelRunner
from common.errors import ConfigError
from common.model_store import ModelFiles
from support.tiny_models import make_tiny_model

DTYPES = ["float32", "bfloat16"]
WAYS = [  # (dtype, who computes, weights)
    ("float32", "torch", "model"),
    ("bfloat16", "torch", "model"),
    ("float32", "native", "model"),
    ("bfloat16", "native", "model"),
    ("bfloat16", "native", "int8"),
]
LENGTH = 200


@dataclasses.dataclass
class Computed:
    logits: torch.Tensor  # after each position that was the last of a chunk
    positions: list[int]
    kv: torch.Tensor  # of the sequence's blocks, in order


class Driver:
    """Runs sequences through an engine the ways a scheduler may."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.taken: list[int] = []

    def blocks_for(self, num_tokens: int) -> list[int]:
        blocks = self.engine.blocks.allocate(num_blocks(num_tokens, self.engine.layout.block_tokens))
        self.taken += blocks
        return blocks

    def release_all(self) -> None:
        self.engine.blocks.release(self.taken)
        self.taken = []

    def run(
        self,
        tokens: Sequence[int],
        ends: Sequence[int],
        *,
        start: int = 0,
        blocks: list[int] | None = None,
        beside: Callable[[], tuple[SequenceSlice, ...]] = tuple,
    ) -> Computed:
        """Computes `tokens[start:]` in chunks that end at `ends`; `beside()` makes the neighbours of each step."""
        blocks = self.blocks_for(len(tokens)) if blocks is None else blocks
        rows = []
        for end in ends:
            share = SequenceSlice(tokens[start:end], start, blocks)
            neighbours = beside()
            # Not always last in the batch: its place must not matter either.
            place = len(rows) % (len(neighbours) + 1)
            batch = ScheduledBatch((*neighbours[:place], share, *neighbours[place:]))
            rows.append(self.engine.runner.compute_logits(batch)[place])
            start = end
        kv = self.engine.pool.tensor[blocks].clone()
        return Computed(torch.stack(rows), [end - 1 for end in ends], kv)


def chunk_ends(length: int, chunk: int, start: int = 0) -> list[int]:
    return [*range(start + chunk, length, chunk), length]


def build(path: Path, dtype: str, *, exact: bool = True, threads: int = 1, pool: int = 8192, **options: object) -> Driver:
    config = EngineConfig(**{"device": "cpu", "dtype": dtype, "exact": exact, "kv_pool_tokens": pool, **options})
    return Driver(build_engine(path, config, threads=threads, model_digest="m", tokenizer_digest="t"))


def random_tokens(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 384), k=length)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def one_thread_afterwards() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@functools.cache
def _driver(path: Path, way: tuple[str, str, str]) -> Driver:
    dtype, kernels, weights = way
    driver = build(path, dtype, kernels=kernels, weights=weights)
    assert isinstance(driver.engine.runner._model, NativeModel) == (kernels == "native")
    return driver


@functools.cache
def _one_by_one(path: Path, way: tuple[str, str, str]) -> Computed:
    """The ground truth: alone, one token at a time."""
    return _driver(path, way).run(random_tokens(LENGTH), chunk_ends(LENGTH, 1))


@pytest.fixture(params=WAYS, ids="-".join)
def way(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    chosen: tuple[str, str, str] = request.param
    return chosen


@pytest.fixture
def driver(tiny: Path, way: tuple[str, str, str]) -> Iterator[Driver]:
    yield _driver(tiny, way)
    _driver(tiny, way).release_all()


@pytest.fixture
def truth(tiny: Path, way: tuple[str, str, str]) -> Computed:
    return _one_by_one(tiny, way)


def assert_same(computed: Computed, truth: Computed) -> None:
    assert torch.equal(computed.logits, truth.logits[computed.positions])
    assert torch.equal(computed.kv, truth.kv)


@pytest.mark.parametrize("chunk", [7, 16, 64, 512])
def test_chunks_of_any_size(driver: Driver, truth: Computed, chunk: int) -> None:
    computed = driver.run(random_tokens(LENGTH), chunk_ends(LENGTH, chunk))
    assert_same(computed, truth)


def test_every_row_of_a_chunk(driver: Driver, truth: Computed) -> None:
    share = SequenceSlice(random_tokens(LENGTH), 0, driver.blocks_for(LENGTH))
    assert torch.equal(driver.engine.runner.compute_all_logits(ScheduledBatch((share,))), truth.logits)


@pytest.mark.parametrize("cached", [1, 15, 16, 17, 31, 32, 48, 63, 64, 65, 128, 199])
@pytest.mark.parametrize("chunk", [5, 512])
def test_prefix_hits_of_any_length(driver: Driver, truth: Computed, cached: int, chunk: int) -> None:
    """KV of the prefix was computed by another request, in other chunks, and lies in this sequence's table."""
    tokens = random_tokens(LENGTH)
    other = driver.blocks_for(cached)
    driver.run(tokens[:cached], chunk_ends(cached, 13), blocks=other)
    mine = [*other, *driver.blocks_for(LENGTH)[len(other) :]]
    computed = driver.run(tokens, chunk_ends(LENGTH, chunk, start=cached), start=cached, blocks=mine)
    assert_same(computed, truth)


@pytest.mark.parametrize("num_neighbours", [1, 3, 20])
@pytest.mark.parametrize("chunk", [1, 24])
def test_batches_of_any_company(driver: Driver, truth: Computed, num_neighbours: int, chunk: int) -> None:
    dice = random.Random(num_neighbours)
    lengths = [dice.randrange(1, 150) for _ in range(num_neighbours)]
    tables = [driver.blocks_for(length + 40) for length in lengths]
    for length, table in zip(lengths, tables, strict=True):
        driver.run(random_tokens(length, seed=length), [length], blocks=table)

    def beside() -> tuple[SequenceSlice, ...]:
        """Some neighbours decode, some compute chunks, some sit this step out."""
        sizes = [dice.choice([0, 1, 1, 1, 2, 7, 40]) for _ in range(num_neighbours)]
        return tuple(
            SequenceSlice(random_tokens(size, seed=size), length, table)
            for size, length, table in zip(sizes, lengths, tables, strict=True)
            if size
        )

    computed = driver.run(random_tokens(LENGTH), chunk_ends(LENGTH, chunk), beside=beside)
    assert_same(computed, truth)


def test_recomputation_after_preemption_gives_the_same_tokens(driver: Driver) -> None:
    """Generate greedily one by one; then lose everything, prefill prompt and output at once, and go on."""
    prompt = random_tokens(50, seed=3)

    def generate(tokens: list[int], start: int, count: int, blocks: list[int]) -> list[int]:
        tokens = list(tokens)
        for _ in range(count):
            spec = SampleSpec(len(tokens), 0, 0, 0.0, 0, 1.0, 0.0, None)
            share = SequenceSlice(tokens[start:], start, blocks, (spec,))
            result = driver.engine.runner.execute(ScheduledBatch((share,)))
            start = len(tokens)
            tokens.append(result.slices[0].tokens[0].token_id)
        return tokens

    straight = generate(prompt, 0, 60, driver.blocks_for(110))
    preempted = generate(prompt, 0, 25, driver.blocks_for(110))
    assert generate(preempted, 0, 35, driver.blocks_for(110)) == straight


def test_which_blocks_hold_the_sequence_does_not_matter_nor_what_was_in_them(driver: Driver, truth: Computed) -> None:
    """A broken transfer may leave any bytes behind, NaN included."""
    blocks = driver.blocks_for(LENGTH)
    random.Random(0).shuffle(blocks)
    driver.engine.pool.tensor[blocks] = torch.nan
    assert_same(driver.run(random_tokens(LENGTH), chunk_ends(LENGTH, 33), blocks=blocks), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        {"heads": 9, "kv_heads": 3, "head_dim": 8, "hidden": 40, "ffn": 88, "vocab": 391},
        {"heads": 3, "kv_heads": 3, "head_dim": 10, "hidden": 30, "ffn": 50, "tie_embeddings": True, "attention_bias": True},
        {"heads": 20, "kv_heads": 1, "head_dim": 12, "hidden": 52, "ffn": 70},
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {"kernels": "torch"},
        {"kernels": "torch", "block_tokens": 24, "exact_tile_rows": 8},
        {"kernels": "torch", "threads": 2},
        {"kernels": "native", "block_tokens": 24},
        {"kernels": "native", "threads": 2, "weights": "int8"},
    ],
)
@pytest.mark.usefixtures("one_thread_afterwards")
def test_awkward_shapes(tmp_path: Path, dtype: str, shape: dict[str, int], options: dict[str, object]) -> None:
    """KV is compared at every position; few steps, since two threads on busy cores wait for each other in each operation."""
    driver = build(make_tiny_model(tmp_path, **shape), **{"dtype": dtype, **options})
    tokens = random_tokens(100)
    truth = driver.run(tokens, [*chunk_ends(97, 6), 98, 99, 100])
    neighbour = SequenceSlice(random_tokens(19, seed=1), 0, driver.blocks_for(19))
    for chunk in (13, 64, 100):
        computed = driver.run(tokens, chunk_ends(100, chunk), beside=lambda: (neighbour,))
        assert torch.equal(computed.logits[-1], truth.logits[-1])
        assert torch.equal(computed.kv, truth.kv)


class RestlessNumerics(ExactNumerics):
    """Exact but for one thing: products of many rows are summed in another order, as free shapes may be."""

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        forwards = super().linear(weight, bias)
        backwards = super().linear(weight.flip(1).contiguous(), bias)
        return lambda rows: forwards(rows) if len(rows) < 32 else backwards(rows.flip(1).contiguous())


def restless_runner(driver: Driver, path: Path) -> ModelRunner:
    engine = driver.engine
    architecture, weights = load_weights(path, engine.dtype)
    numerics = RestlessNumerics(16)
    model = create_model(architecture, weights, numerics, engine.max_model_tokens)
    return ModelRunner(model, engine.pool, numerics, architecture.num_heads)


def test_the_comparison_sees_another_order_of_summation(tiny: Path) -> None:
    """The inverse test: the grid above fails on numerics that are exact except for large chunks."""
    driver = build(tiny, "float32")
    driver.engine = dataclasses.replace(driver.engine, runner=restless_runner(driver, tiny))
    one_by_one = driver.run(random_tokens(LENGTH), chunk_ends(LENGTH, 1))
    assert_same(driver.run(random_tokens(LENGTH), chunk_ends(LENGTH, 7)), one_by_one)
    with pytest.raises(AssertionError):
        assert_same(driver.run(random_tokens(LENGTH), chunk_ends(LENGTH, 512)), one_by_one)


def test_an_engine_that_is_not_exact_does_not_start_in_exact_mode(tiny: Path) -> None:
    driver = build(tiny, "float32")
    engine = driver.engine
    arguments = (engine.pool, engine.blocks, engine.architecture.vocab_size, engine.max_model_tokens)
    check_exactness(engine.runner, *arguments)
    with pytest.raises(ConfigError, match="exact mode does not hold"):
        check_exactness(restless_runner(driver, tiny), *arguments)
    assert engine.blocks.num_used == 0


def test_the_check_makes_do_with_a_small_pool(tiny: Path) -> None:
    for pool in (16, 32, 48):
        driver = build(tiny, "float32", pool=pool)
        assert driver.engine.blocks.num_used == 0


def test_tile_rows_that_libraries_treat_unevenly_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple") as caught:
        ExactNumerics(5)
    assert caught.value.param == "engine.exact_tile_rows"


# -- the operations that are the same code in both modes ------------------------------------------------------------------

CUTS = [(0, 1), (1, 2), (0, 7), (5, 29), (16, 32), (3, 300), (299, 300)]


def assert_rows_stand_alone(operation: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> None:
    whole = operation(rows.clone())
    for start, end in CUTS:
        assert torch.equal(operation(rows[start:end].clone()), whole[start:end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [10, 33, 64, 576, 1536, 4096])
def test_rows_of_every_operation_stand_alone(dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    rows = (torch.randn(300, width, generator=generator) * 5).to(dtype)
    numerics = ExactNumerics(16)
    assert_rows_stand_alone(RMSNorm(torch.randn(width, generator=generator).to(dtype), 1e-5), rows)
    assert_rows_stand_alone(lambda part: numerics.operations.gated_silu(torch.cat((part, part.flip(1)), dim=1)), rows)
    assert_rows_stand_alone(lambda part: numerics.operations.gated_gelu(torch.cat((part, part.flip(1)), dim=1)), rows)
    assert_rows_stand_alone(lambda part: torch.log_softmax(part.float(), dim=-1), rows)
    weight = (torch.randn(96, width, generator=generator) / width**0.5).to(dtype)
    assert_rows_stand_alone(numerics.linear(weight, None), rows)
    if width % 2 == 0:
        rotary = RotaryEmbedding(width, 1e4, None, 512, torch.device("cpu"))
        alone = [rotary.turn(rows[i : i + 1, None], rotary.angles(torch.tensor([i]))) for i in range(300)]
        assert torch.equal(torch.cat(alone), rotary.turn(rows[:, None], rotary.angles(torch.arange(300))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_silu_and_gelu(dtype: torch.dtype) -> None:
    gate, up = torch.randn(20, 70).mul(6).to(dtype), torch.randn(20, 70).to(dtype)
    expected = (torch.nn.functional.silu(gate.double()) * up.double()).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    for numerics in (FastNumerics(), ExactNumerics(16)):
        torch.testing.assert_close(numerics.operations.gated_silu(torch.cat((gate, up), 1)), expected, rtol=tolerance, atol=1e-6)
    expected = (torch.nn.functional.gelu(gate.double(), approximate="tanh") * up.double()).to(dtype)
    for numerics in (FastNumerics(), ExactNumerics(16)):
        torch.testing.assert_close(
            numerics.operations.gated_gelu(torch.cat((gate, up), 1)), expected, rtol=3 * tolerance, atol=3e-6
        )


# -- the real model -------------------------------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.parametrize(("dtype", "kernels", "weights"), WAYS)
def test_the_default_model_is_exact(smollm2: ModelFiles, dtype: str, kernels: str, weights: str) -> None:
    driver = build(smollm2.path, dtype, kernels=kernels, weights=weights)
    tokens = random.Random(0).choices(range(100, 40_000), k=90)
    blocks = driver.blocks_for(90)
    truth = driver.run(tokens, [*chunk_ends(64, 16), *range(65, 91)], blocks=blocks)
    neighbour = SequenceSlice(tokens[:20], 0, driver.blocks_for(20))
    whole = driver.run(tokens, [90])
    assert torch.equal(whole.logits[0], truth.logits[-1])
    assert torch.equal(whole.kv, truth.kv)
    hit = [*blocks[:3], *driver.blocks_for(90)[3:]]
    computed = driver.run(tokens, [70, 89, 90], start=48, blocks=hit, beside=lambda: (neighbour,))
    assert torch.equal(computed.logits, truth.logits[[truth.positions.index(p) for p in computed.positions]])
    assert torch.equal(computed.kv, truth.kv)
