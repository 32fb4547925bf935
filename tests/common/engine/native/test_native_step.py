"""The compiled step against torch with the fp64 attention reference on made-up models, and what it refuses."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from common.engine.attention import create_attention
from common.engine.batch import ScheduledBatch, SequenceSlice
from common.engine.block_matrix import BlockKind
from common.engine.kv_pool import NULL_BLOCK, KVPool
from common.engine.loader import ModelArchitecture
from common.engine.native.build import build_library
from common.engine.native.check import check_library
from common.engine.native.library import Library
from common.engine.numerics import FastNumerics
from common.engine.packed_matrix import Product
from common.engine.quantisation import WeightFormat
from common.engine.step_input import StepBuffers
from common.errors import EngineFailure
from support.step_worlds import BUSY, CONTEXT, WAYS, Case, World, architecture, cases, one_by_one


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
