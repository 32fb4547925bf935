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
from kvtransfer.ranks.parts import Degrees, Pair, in_units, parts_of, rank_name, units_of, window_of
from kvtransfer.window import PeerWindow, Run, part_of

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
    whole = layout(num_layers, num_heads, dtype)
    parts = parts_of(whole, giving, taking)
    travelled: Counter[tuple[int, int]] = Counter()
    for pair, runs in parts.items():
        ours, theirs = held_by(pair.giver, here), held_by(pair.taker, there)
        check_part(part_of(runs), len(theirs))
        assert len(theirs) == in_units(window_of(whole, taking, pair.taker)).num_layers
        assert len(ours) == in_units(window_of(whole, giving, pair.giver)).num_layers
        for run in runs:
            for step in range(run.num_layers):
                assert theirs[run.there + step] == ours[run.here + step]
                travelled[theirs[run.there + step]] += 1
    assert travelled == Counter(here.keys())
    assert next(iter(parts)) == Pair(0, 0)


def held_by(rank: int, owner_of: dict[tuple[int, int], int]) -> list[tuple[int, int]]:
    """(layer, head) in the order of the rank's blocks."""
    return sorted(place for place, owner in owner_of.items() if owner == rank)


@FEW
@given(st.integers(4, 9), st.integers(4, 9), DEGREES, st.data())
def test_units_of_layers_are_those_of_each_rank(num_layers: int, num_heads: int, degrees: Degrees, data: st.DataObject) -> None:
    owner_of = owners(num_layers, num_heads, degrees)
    first = data.draw(st.integers(0, num_layers))
    end = data.draw(st.integers(first, num_layers))
    for rank in range(degrees.num_ranks):
        units = range(*units_of(layout(num_layers, num_heads), degrees, rank, (first, end)))
        held = held_by(rank, owner_of)
        assert [held[unit] for unit in units] == [place for place in held if first <= place[0] < end]


def test_ranks_that_hold_the_same_heads_share_one_run() -> None:
    whole = layout(4, 4)
    assert parts_of(whole, Degrees(2, 2), Degrees(2, 1)) == {
        Pair(0, 0): (Run(0, 0, 4),),
        Pair(1, 1): (Run(0, 0, 4),),
        Pair(2, 0): (Run(4, 0, 4),),
        Pair(3, 1): (Run(4, 0, 4),),
    }
    assert parts_of(whole, Degrees(2, 1), Degrees(1, 1))[Pair(1, 0)] == tuple(Run(4 * n + 2, 2 * n, 2) for n in range(4))


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
            for pair, runs in parts_of(layout(num_layers, num_heads), degrees, Degrees()).items()
            if pair.giver == share.rank
            for run in runs
            for unit in range(run.there, run.there + run.num_layers)
        }
        own = window_of(layout(num_layers, num_heads), degrees, share.rank)
        assert own == share.layout(layout(num_layers, num_heads))
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


def test_layers_that_are_not_held_together_are_refused() -> None:
    window = PeerWindow(layout(8, 1), (Run(0, 5, 2), Run(2, 9, 1), Run(4, 0, 3)))
    assert [window.here(0, 2), window.here(1, 2), window.here(5, 7)] == [5, 6, 1]
    for first, end in ((1, 3), (3, 4), (6, 8)):
        with pytest.raises(TicketRefused) as refused:
            window.here(first, end)
        assert refused.value.param == "part"


def test_no_part_is_all_of_it() -> None:
    assert mask_of((), 3) == 0b111
    assert list(runs_within((), 1, 3)) == [(1, 3)]


@pytest.mark.parametrize("part", [(0,), (0, 0), (-1, 2), (3, 2), (0, 2, 1, 1), (2, 1, 0, 1)], ids=str)
def test_what_is_no_part_is_refused(part: tuple[int, ...]) -> None:
    with pytest.raises(TicketRefused) as refused:
        check_part(part, 4)
    assert refused.value.param == "part"
