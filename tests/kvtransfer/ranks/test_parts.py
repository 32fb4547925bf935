"""Who gives which part of a block to whom, against elements that are dealt to ranks one at a time."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import ParallelConfig
from common.engine.parallel.share import shares_of
from common.errors import HandshakeRefused, TicketRefused
from common.types import KVLayout
from kvtransfer.part import check_part, mask_of, runs_within
from kvtransfer.ranks.parts import Degrees, Pair, in_units, parts_of, rank_name

FEW = settings(max_examples=40, deadline=None)
DEGREES = st.builds(Degrees, st.integers(1, 4), st.integers(1, 4))


def layout(num_layers: int, num_heads: int, dtype: str = "float32") -> KVLayout:
    return KVLayout("m", "t", num_layers, num_heads, 8, 16, dtype, False)


def owners(num_layers: int, num_heads: int, degrees: Degrees) -> dict[tuple[int, int], int]:
    """The rank of each (layer, head)."""
    stages = np.array_split(np.arange(num_layers), degrees.pipeline_parallel)
    shards = np.array_split(np.arange(num_heads), degrees.tensor_parallel)
    return {
        (int(layer), int(head)): stage * degrees.tensor_parallel + shard
        for stage, layers in enumerate(stages)
        for shard, heads in enumerate(shards)
        for layer, head in itertools.product(layers, heads)
    }


@FEW
@given(st.integers(4, 9), st.integers(4, 9), DEGREES, DEGREES, st.sampled_from(["float32", "int8-bfloat16"]))
def test_every_head_of_every_layer_travels_once_between_its_two_owners(
    num_layers: int, num_heads: int, giving: Degrees, taking: Degrees, dtype: str
) -> None:
    here, there = owners(num_layers, num_heads, giving), owners(num_layers, num_heads, taking)
    parts = parts_of(layout(num_layers, num_heads, dtype), giving, taking)
    travelled: Counter[int] = Counter()
    for pair, part in parts.items():
        check_part(part, num_layers * num_heads)
        for first, count in zip(part[::2], part[1::2], strict=True):
            for unit in range(first, first + count):
                place = divmod(unit, num_heads)
                assert pair == (here[place], there[place])
                travelled[unit] += 1
    assert travelled == Counter(range(num_layers * num_heads))
    assert next(iter(parts)) == Pair(0, 0)


@FEW
@given(st.integers(4, 9), st.integers(4, 9), DEGREES)
def test_ranks_hold_what_the_engine_gives_them(num_layers: int, num_heads: int, degrees: Degrees) -> None:
    architecture = SimpleNamespace(
        num_layers=num_layers, num_heads=2 * num_heads, num_kv_heads=num_heads, ffn_size=512, vocab_size=512, num_experts=None
    )
    parallel = ParallelConfig(tensor_parallel=degrees.tensor_parallel, pipeline_parallel=degrees.pipeline_parallel)
    for share in shares_of(cast(Any, architecture), parallel):
        held = {
            unit
            for pair, part in parts_of(layout(num_layers, num_heads), degrees, Degrees()).items()
            if pair.giver == share.rank
            for first, count in zip(part[::2], part[1::2], strict=True)
            for unit in range(first, first + count)
        }
        assert held == {layer * num_heads + head for layer in share.layers for head in share.kv_heads}


def test_a_block_of_units_is_the_same_block() -> None:
    whole = layout(3, 4)
    assert in_units(whole).block_bytes == whole.block_bytes
    assert in_units(whole).num_layers == 12
    assert [rank_name("m/decode/0", rank) for rank in (0, 2)] == ["m/decode/0", "m/decode/0/rank/2"]


def test_degrees_that_cannot_be_are_refused() -> None:
    with pytest.raises(HandshakeRefused) as refused:
        parts_of(layout(2, 4), Degrees(1, 3), Degrees())
    assert refused.value.param == "pipeline_parallel"


@FEW
@given(st.sets(st.integers(0, 11), min_size=1), st.integers(0, 12), st.integers(0, 12))
def test_runs_are_what_a_range_has_of_a_part(layers: set[int], first: int, end: int) -> None:
    part = tuple(number for layer in sorted(layers) for number in (layer, 1))
    check_part(part, 12)
    assert mask_of(part, 12) == sum(1 << layer for layer in layers)
    found = [layer for run in runs_within(part, first, end) for layer in range(*run)]
    assert found == sorted(layers & set(range(first, end)))


def test_no_part_is_all_of_it() -> None:
    assert mask_of((), 3) == 0b111
    assert list(runs_within((), 1, 3)) == [(1, 3)]


@pytest.mark.parametrize("part", [(0,), (0, 0), (-1, 2), (3, 2), (0, 2, 1, 1), (2, 1, 0, 1)], ids=str)
def test_what_is_no_part_is_refused(part: tuple[int, ...]) -> None:
    with pytest.raises(TicketRefused) as refused:
        check_part(part, 4)
    assert refused.value.param == "part"
