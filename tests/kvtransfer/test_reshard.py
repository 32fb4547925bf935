"""Plans against a naive oracle: global values, scattered into each rank's blocks by plain loops that know nothing of plans."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis.errors import NoSuchExample

from common.errors import HandoffError, HandshakeRefused, TicketRefused
from common.types import KVLayout
from kvtransfer import reshard
from kvtransfer.reshard import (
    BlockTable,
    CopyPlan,
    Loop,
    Rank,
    ShardedLayout,
    Side,
    check_reshardable,
    execute,
    pairs,
    plan_copies,
)

Array = npt.NDArray[Any]
STORED = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}
MODEL = KVLayout("model", "tokenizer", 4, 4, 8, 16, "bfloat16", False)


# -- the oracle -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    num_layers: int
    num_heads: int
    head_dim: int
    source: ShardedLayout
    destination: ShardedLayout
    first_token: int
    num_tokens: int
    dealt: int  # seed of block tables and values
    turn: int


class NaiveSide:
    """Who holds what, worked out by dealing layers and heads to ranks one at a time."""

    def __init__(self, sharded: ShardedLayout, tables: dict[Rank, BlockTable], pool_blocks: int) -> None:
        layout = sharded.layout
        heads, shards = layout.num_kv_heads, sharded.tensor_parallel
        layers_by_stage = [list(part) for part in np.array_split(np.arange(layout.num_layers), sharded.pipeline_parallel)]
        if shards <= heads:
            heads_by_shard = [list(part) for part in np.array_split(np.arange(heads), shards)]
        else:
            heads_by_shard = [[head] for head in np.repeat(np.arange(heads), shards // heads)]
        self.block_tokens = layout.block_tokens
        self.tables = tables
        self.layers = {rank: layers_by_stage[rank.stage] for rank in tables}
        self.heads = {rank: heads_by_shard[rank.shard] for rank in tables}
        self.pools: dict[Rank, Array] = {}
        for rank in tables:
            shape = (len(self.layers[rank]), len(self.heads[rank]), 2, layout.block_tokens, layout.head_dim)
            self.pools[rank] = np.zeros((pool_blocks, *shape), STORED[layout.dtype])

    def places(self, rank: Rank, tokens: range) -> Iterator[tuple[tuple[int, int, int, int], tuple[int, int, int, int, int]]]:
        """((layer, head, half, token), index of its row in the rank's pool)."""
        table = self.tables[rank]
        for token in tokens:
            block = table.blocks[token // self.block_tokens - table.first_block]
            for (i, layer), (j, head), half in itertools.product(
                enumerate(self.layers[rank]), enumerate(self.heads[rank]), (0, 1)
            ):
                yield (layer, head, half, token), (block, i, j, half, token % self.block_tokens)


def tables_for(
    sharded: ShardedLayout, first_token: int, num_tokens: int, dice: random.Random
) -> tuple[dict[Rank, BlockTable], int]:
    """A table for each rank, over shuffled blocks, sometimes from a later block on; and the size of a pool that is not full."""
    block_tokens = sharded.layout.block_tokens
    first_block = dice.randrange(first_token // block_tokens + 1)
    count = -(-num_tokens // block_tokens) - first_block + dice.randrange(2)
    count = max(count, 0)
    pool_blocks = count + 1 + dice.randrange(3)
    one = BlockTable(tuple(dice.sample(range(pool_blocks), count)), first_block)
    own = {rank: BlockTable(tuple(dice.sample(range(pool_blocks), count)), first_block) for rank in sharded.ranks}
    return (own if dice.random() < 0.5 else dict.fromkeys(sharded.ranks, one)), pool_blocks


def global_values(case: Case, dice: random.Random) -> Array:
    layout = case.source.layout
    shape = (case.num_layers, case.num_heads, 2, max(case.num_tokens, 1), case.head_dim)
    if layout.dtype == case.destination.layout.dtype:
        # Every bit pattern once, NaN included, as long as there are enough of them.
        return np.arange(1, np.prod(shape) + 1).astype(STORED[layout.dtype]).reshape(shape)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(dice.randrange(1 << 30))) * 50
    return drawn.to(getattr(torch, layout.dtype)).view(getattr(torch, f"int{8 * STORED[layout.dtype]().itemsize}")).numpy()


def converted(values: Array, source: str, destination: str) -> Array:
    if source == destination:
        return values
    there = torch.from_numpy(values).view(getattr(torch, source)).to(getattr(torch, destination))
    return there.view(getattr(torch, f"int{8 * STORED[destination]().itemsize}")).numpy()


def check(case: Case) -> None:
    """The whole promise, for all pairs of ranks of one hand-over."""
    dice = random.Random(case.dealt)
    tokens = range(case.first_token, case.num_tokens)
    values = global_values(case, dice)
    naive_source = NaiveSide(case.source, *tables_for(case.source, case.first_token, case.num_tokens, dice))
    for rank, pool in naive_source.pools.items():
        pool.reshape(-1)[:] = 7  # stale, and not unique
        for (layer, head, half, token), index in naive_source.places(rank, tokens):
            pool[index] = values[layer, head, half, token]

    naive = NaiveSide(case.destination, *tables_for(case.destination, case.first_token, case.num_tokens, dice))
    expected: dict[Rank, Array] = {}
    there = converted(values, case.source.layout.dtype, case.destination.layout.dtype)
    needed: dict[Rank, Array] = {}
    for rank, pool in naive.pools.items():
        pool.view(np.uint8).reshape(-1)[:] = np.random.default_rng(case.dealt).integers(0, 256, pool.nbytes, np.uint8)
        expected[rank] = pool.copy()
        needed[rank] = np.zeros(pool.shape, bool)
        for (layer, head, half, token), index in naive.places(rank, tokens):
            expected[rank][index] = there[layer, head, half, token]
            needed[rank][index] = True

    written = {rank: np.zeros(pool.nbytes, np.int32) for rank, pool in naive.pools.items()}
    talking = set(pairs(case.source, case.destination, turn=case.turn))
    for giver, taker in itertools.product(case.source.ranks, case.destination.ranks):
        source = Side(case.source, giver, naive_source.tables[giver])
        destination = Side(case.destination, taker, naive.tables[taker])
        plan = reshard.plan_copies(source, destination, first_token=case.first_token, num_tokens=case.num_tokens, turn=case.turn)
        copies = list(plan.copies())
        assert plan.num_copies == len(copies)
        assert bool(copies) == ((giver, taker) in talking and len(tokens) > 0)
        for copy in copies:
            start = copy.destination_block * plan.destination_block_bytes + copy.destination_offset_bytes
            written[taker][start : start + copy.destination_size_bytes] += 1
            assert copy.source_size_bytes * naive.pools[taker].itemsize == copy.destination_size_bytes * values.itemsize
        assert sum(copy.source_size_bytes for copy in copies) == plan.num_values * values.itemsize
        check_fewest(plan)
        execute(plan, naive_source.pools[giver].data, naive.pools[taker].data)
    for rank, pool in naive.pools.items():
        assert np.array_equal(written[rank].reshape(-1, pool.itemsize), np.repeat(needed[rank].reshape(-1, 1), pool.itemsize, 1))
        assert pool.tobytes() == expected[rank].tobytes()


def check_fewest(plan: CopyPlan) -> None:
    """As many copies as there are places where a value's successor in one block is not its successor in the other."""
    moves: dict[tuple[int, int], tuple[int, int]] = {}
    source_size, destination_size = (STORED[dtype]().itemsize for dtype in (plan.source_dtype, plan.destination_dtype))
    for copy in plan.copies():
        for i in range(copy.source_size_bytes // source_size):
            at = (copy.source_block, copy.source_offset_bytes // source_size + i)
            moves[at] = (copy.destination_block, copy.destination_offset_bytes // destination_size + i)
    starts = sum(moves.get((block, at - 1)) != (to, there - 1) for (block, at), (to, there) in moves.items())
    assert plan.num_copies == starts


# -- cases ----------------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_layers, num_heads = draw(st.integers(1, 7)), draw(st.integers(1, 8))
    head_dim = draw(st.integers(1, 3))
    shards = [degree for degree in range(1, 9) if degree <= num_heads or degree % num_heads == 0]
    block_sizes = st.one_of(st.integers(1, 9), st.sampled_from([8, 16, 24]))
    same_cut = draw(st.integers(0, 3)) == 0

    def side() -> ShardedLayout:
        dtype = draw(st.sampled_from(sorted(STORED)))
        layout = KVLayout("m", "t", num_layers, num_heads, head_dim, draw(block_sizes), dtype, False)
        return ShardedLayout(layout, draw(st.sampled_from(shards)), draw(st.integers(1, min(4, num_layers))))

    source = side()
    destination = source if same_cut and draw(st.booleans()) else side()
    if same_cut:  # otherwise equal block sizes and equal dtypes would be rare
        layout = replace(source.layout, block_tokens=source.layout.block_tokens)
        destination = replace(destination, layout=layout)
    num_tokens = draw(st.integers(0, 40))
    return Case(
        num_layers,
        num_heads,
        head_dim,
        source,
        destination,
        draw(st.integers(0, num_tokens)),
        num_tokens,
        draw(st.integers(0, 1 << 20)),
        draw(st.integers(0, 3)),
    )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_every_rank_gets_what_it_holds_once_and_nothing_else_changes(case: Case) -> None:
    check(case)


def whole(layout: KVLayout, tp: int = 1, pp: int = 1) -> ShardedLayout:
    return ShardedLayout(layout, tp, pp)


def sides(
    source: ShardedLayout, destination: ShardedLayout, num_tokens: int, ranks: tuple[Rank, Rank] = (Rank(0, 0), Rank(0, 0))
) -> tuple[Side, Side]:
    def side(sharded: ShardedLayout, rank: Rank) -> Side:
        return Side(sharded, rank, BlockTable(tuple(range(-(-num_tokens // sharded.layout.block_tokens)))))

    return side(source, ranks[0]), side(destination, ranks[1])


def copies_between(
    source: ShardedLayout, destination: ShardedLayout, num_tokens: int, first_token: int = 0, **options: Any
) -> int:
    return plan_copies(
        *sides(source, destination, num_tokens), first_token=first_token, num_tokens=num_tokens, **options
    ).num_copies


@pytest.mark.parametrize(
    ("source", "destination", "num_tokens", "expected"),
    [
        pytest.param(whole(MODEL), whole(MODEL), 64, 4, id="equal: one a block"),
        pytest.param(whole(MODEL), whole(replace(MODEL, dtype="float32")), 64, 4, id="other dtype: one a block"),
        pytest.param(whole(MODEL, 2, 2), whole(MODEL, 2, 2), 64, 4, id="equally cut: one a block"),
        pytest.param(whole(MODEL, 1, 1), whole(MODEL, 1, 2), 64, 4, id="other stages: one a block"),
        pytest.param(whole(MODEL, 1, 1), whole(MODEL, 2, 1), 64, 4 * 4, id="other heads: one a block and layer"),
        pytest.param(whole(MODEL, 1, 1), whole(MODEL, 2, 4), 64, 4, id="other heads, one layer: one a block"),
        pytest.param(whole(MODEL), whole(MODEL), 65, 4 + 4 * 4 * 2, id="a block partly filled: one a layer, head, K and V"),
        pytest.param(whole(MODEL), whole(replace(MODEL, block_tokens=8)), 64, 8 * 4 * 4 * 2, id="other block size"),
        pytest.param(whole(replace(MODEL, block_tokens=24)), whole(MODEL), 48, 4 * 4 * 4 * 2, id="24 to 16"),
    ],
)  # fmt: skip
def test_the_number_of_copies_is_what_is_documented(
    source: ShardedLayout, destination: ShardedLayout, num_tokens: int, expected: int
) -> None:
    assert copies_between(source, destination, num_tokens) == expected


def test_a_range_of_layers_is_one_copy_a_block() -> None:
    assert copies_between(whole(MODEL), whole(MODEL), 64, layers=range(1, 3)) == 4
    assert copies_between(whole(MODEL), whole(MODEL), 64, first_token=32, layers=range(1, 3)) == 2
    assert copies_between(whole(MODEL), whole(MODEL), 64, layers=range(2, 2)) == 0


def test_a_plan_is_compact() -> None:
    """A long prompt does not cost an object per copy."""
    other = whole(replace(MODEL, block_tokens=24), 2)
    plan = plan_copies(*sides(whole(MODEL), other, 4800), first_token=0, num_tokens=4800)
    assert len(plan.strided) == 400
    assert plan.num_copies == 400 * 4 * 2 * 2


@settings(max_examples=100, deadline=None)
@given(cases(), st.data())
def test_layers_and_chunks_one_after_the_other_are_the_whole_plan(case: Case, data: st.DataObject) -> None:
    """Pushed as the source goes on, in any order of layer ranges and chunks, each value is copied once, to its place."""
    layer_cuts = sorted(data.draw(st.sets(st.integers(1, case.num_layers))) | {0, case.num_layers})
    token_cuts = sorted({*data.draw(st.sets(st.integers(case.first_token, case.num_tokens))), case.first_token, case.num_tokens})
    dice = random.Random(case.dealt)
    source_tables, _ = tables_for(case.source, case.first_token, case.num_tokens, dice)
    destination_tables, _ = tables_for(case.destination, case.first_token, case.num_tokens, dice)

    def moves(plan: CopyPlan) -> Counter[tuple[int, int, int, int]]:
        sizes = [STORED[dtype]().itemsize for dtype in (plan.source_dtype, plan.destination_dtype)]
        return Counter(
            (
                copy.source_block,
                copy.source_offset_bytes + i * sizes[0],
                copy.destination_block,
                copy.destination_offset_bytes + i * sizes[1],
            )
            for copy in plan.copies()
            for i in range(copy.source_size_bytes // sizes[0])
        )

    for giver, taker in pairs(case.source, case.destination, turn=case.turn):
        source, destination = (
            Side(case.source, giver, source_tables[giver]),
            Side(case.destination, taker, destination_tables[taker]),
        )
        together: Counter[tuple[int, int, int, int]] = Counter()
        for first_token, num_tokens in itertools.pairwise(token_cuts):
            for first_layer, end_layer in itertools.pairwise(layer_cuts):
                part = plan_copies(
                    source, destination, first_token=first_token, num_tokens=num_tokens,
                    layers=range(first_layer, end_layer), turn=case.turn,
                )  # fmt: skip
                together += moves(part)
        plan = plan_copies(source, destination, first_token=case.first_token, num_tokens=case.num_tokens, turn=case.turn)
        assert together == moves(plan)


def test_layers_are_those_of_the_model() -> None:
    """The layers that become free with range(2, 4) are the first two of the second stage."""
    source, destination = sides(whole(MODEL, 1, 2), whole(MODEL), 16, (Rank(1, 0), Rank(0, 0)))
    (copy,) = plan_copies(source, destination, first_token=0, num_tokens=16, layers=range(2, 3)).copies()
    layer_bytes = 4 * 2 * 16 * 8 * 2
    assert (copy.source_offset_bytes, copy.destination_offset_bytes, copy.source_size_bytes) == (0, 2 * layer_bytes, layer_bytes)
    assert not plan_copies(source, destination, first_token=0, num_tokens=16, layers=range(0, 2)).strided


def test_owners_of_copies_of_a_head_share_the_work() -> None:
    for heads, stages, degrees in itertools.product(
        (1, 2, 4), ((1, 1), (1, 3), (2, 3), (4, 1)), ((8, 1), (8, 2), (4, 8), (8, 8))
    ):
        layout = replace(MODEL, num_layers=5, num_kv_heads=heads)
        source, destination = whole(layout, degrees[0], stages[0]), whole(layout, degrees[1], stages[1])
        served: Counter[tuple[int, int, int]] = Counter()  # stage, head, owner
        per_head = max(1, degrees[0] // heads)
        for giver, taker in pairs(source, destination):
            for head in set(source.heads_of(giver.shard)) & set(destination.heads_of(taker.shard)):
                served[giver.stage, head, giver.shard % per_head] += 1
        for stage, head in itertools.product(range(stages[0]), range(heads)):
            counts = [served[stage, head, owner] for owner in range(per_head)]
            assert max(counts) - min(counts) <= 1, (heads, stages, degrees, counts)


def test_turn_moves_the_work_to_another_owner() -> None:
    layout = replace(MODEL, num_kv_heads=1)
    givers = [{giver for giver, _ in pairs(whole(layout, 4), whole(layout, 1), turn=turn)} for turn in range(5)]
    assert givers == [{Rank(0, shard)} for shard in (0, 1, 2, 3, 0)]


# -- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("model_digest", "x"), ("tokenizer_digest", "x"), ("num_layers", 5), ("num_kv_heads", 8), ("head_dim", 16), ("exact", True)],
)  # fmt: skip
def test_what_must_be_equal_is_refused_by_name(field: str, value: object) -> None:
    other = replace(MODEL, **{field: value})  # type: ignore[arg-type]
    for one, two in ((MODEL, other), (other, MODEL)):
        with pytest.raises(HandshakeRefused) as refused:
            check_reshardable(one, two)
        assert refused.value.param == field
        with pytest.raises(HandshakeRefused) as refused:
            plan_copies(*sides(whole(one), whole(two), 16), first_token=0, num_tokens=16)
        assert refused.value.param == field
        with pytest.raises(HandshakeRefused):
            pairs(whole(one), whole(two))


def test_block_size_may_differ_and_dtype_too_unless_exact() -> None:
    check_reshardable(MODEL, replace(MODEL, block_tokens=24, dtype="float32"))
    exact = replace(MODEL, exact=True)
    for block_tokens in (1, 8, 32, 64):  # 16 here: tiles of 64 tokens in either
        check_reshardable(exact, replace(exact, block_tokens=block_tokens))
    for block_tokens in (24, 48, 128):
        with pytest.raises(HandshakeRefused) as refused:
            check_reshardable(exact, replace(exact, block_tokens=block_tokens))
        assert refused.value.param == "block_tokens"
    with pytest.raises(HandshakeRefused) as refused:
        check_reshardable(exact, replace(exact, dtype="float32"))
    assert refused.value.param == "dtype"


@pytest.mark.parametrize("swap", [False, True])
def test_a_dtype_without_conversion_is_refused(swap: bool) -> None:
    one, two = MODEL, replace(MODEL, dtype="float64")
    with pytest.raises(HandshakeRefused) as refused:
        check_reshardable(*((two, one) if swap else (one, two)))
    assert refused.value.param == "dtype"


@pytest.mark.parametrize(
    ("changes", "degrees", "param"),
    [
        ({}, (6, 1), "tensor_parallel"),
        ({}, (0, 1), "tensor_parallel"),
        ({}, (-4, 1), "tensor_parallel"),
        ({}, (1, 5), "pipeline_parallel"),
        ({}, (1, 0), "pipeline_parallel"),
        ({"num_layers": 0}, (1, 1), "num_layers"),
        ({"num_kv_heads": -1}, (1, 1), "num_kv_heads"),
        ({"head_dim": 0}, (1, 1), "head_dim"),
        ({"block_tokens": 0}, (1, 1), "block_tokens"),
        ({"dtype": "int8"}, (1, 1), "dtype"),
    ],
)
def test_a_side_that_cannot_be_is_refused(changes: dict[str, Any], degrees: tuple[int, int], param: str) -> None:
    with pytest.raises(HandshakeRefused) as refused:
        ShardedLayout(replace(MODEL, **changes), *degrees)
    assert refused.value.param == param


@pytest.mark.parametrize("rank", [Rank(1, 0), Rank(0, 2), Rank(-1, 0), Rank(0, -1)])
def test_a_rank_that_is_not_there_is_refused(rank: Rank) -> None:
    with pytest.raises(HandshakeRefused) as refused:
        Side(whole(MODEL, 2), rank, BlockTable(()))
    assert refused.value.param == "rank"


def test_tables_and_tokens_that_do_not_fit_are_refused() -> None:
    def param_of(call: Callable[[], object]) -> str | None:
        with pytest.raises(TicketRefused) as refused:
            call()
        return refused.value.param

    assert param_of(lambda: BlockTable((1, 2, 1))) == "blocks"
    assert param_of(lambda: BlockTable((1, -1))) == "blocks"
    assert param_of(lambda: BlockTable((1,), -1)) == "first_block"
    full = Side(whole(MODEL), Rank(0, 0), BlockTable((0, 1)))
    late = Side(whole(MODEL), Rank(0, 0), BlockTable((0, 1), 1))
    assert param_of(lambda: plan_copies(full, full, first_token=0, num_tokens=33)) == "blocks"
    assert param_of(lambda: plan_copies(full, late, first_token=15, num_tokens=32)) == "blocks"
    assert param_of(lambda: plan_copies(late, full, first_token=15, num_tokens=32)) == "blocks"
    assert plan_copies(late, full, first_token=16, num_tokens=32).num_copies == 1
    assert param_of(lambda: plan_copies(full, full, first_token=-1, num_tokens=16)) == "first_token"
    assert param_of(lambda: plan_copies(full, full, first_token=17, num_tokens=16)) == "first_token"
    for layers in (range(-1, 2), range(0, 5), range(0, 4, 2)):
        with pytest.raises(HandshakeRefused) as refused:
            plan_copies(full, full, first_token=0, num_tokens=16, layers=layers)
        assert refused.value.param == "layers"


def test_a_block_outside_the_pool_is_refused_before_anything_is_written() -> None:
    source, destination = (Side(whole(MODEL), Rank(0, 0), BlockTable(blocks)) for blocks in ((0, 1), (0, 2)))
    plan = plan_copies(source, destination, first_token=0, num_tokens=32)
    blocks = np.full(2 * MODEL.block_bytes, 9, np.uint8)
    pool = np.zeros(2 * MODEL.block_bytes, np.uint8)
    with pytest.raises(TicketRefused):
        execute(plan, blocks.data, pool.data)
    assert not pool.any()


def test_a_value_too_large_for_the_destination_is_refused() -> None:
    source, destination = sides(whole(replace(MODEL, dtype="float32")), whole(replace(MODEL, dtype="float16")), 16)
    plan = plan_copies(source, destination, first_token=0, num_tokens=16)
    values = np.full(plan.num_values, 1e6, np.float32)
    with pytest.raises(HandoffError, match="too large"):
        execute(plan, values.data, np.zeros(plan.num_values, np.uint16).data)


# -- would the property notice? --------------------------------------------------------------------------------------------


def _wrong_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Side.offset_bytes

    def offset_bytes(side: Side, layer: int, head: int, token: int) -> int:
        beside = (head + 1) % side.sharded.layout.num_kv_heads
        return right(side, layer, beside if beside in side.sharded.heads_of(side.rank.shard) else head, token)

    monkeypatch.setattr(Side, "offset_bytes", offset_bytes)


def _wrong_layers_on_uneven_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last stages, not the first, hold one more."""

    def layers_of(sharded: ShardedLayout, stage: int) -> range:
        fewest, more = divmod(sharded.layout.num_layers, sharded.pipeline_parallel)
        even = sharded.pipeline_parallel - more
        first = stage * fewest + max(0, stage - even)
        return range(first, first + fewest + (stage >= even))

    monkeypatch.setattr(ShardedLayout, "layers_of", layers_of)


def _patched_overlaps(change: Callable[[list[Any]], list[Any]]) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        right = reshard._overlaps

        def overlaps(*arguments: Any) -> list[Any]:
            found = list(right(*arguments))
            return change(found) if found else found

        monkeypatch.setattr(reshard, "_overlaps", overlaps)

    apply.__name__ = change.__name__
    return apply


def _one_token_short(overlaps: list[Any]) -> list[Any]:
    *before, (source, destination, tokens) = overlaps
    return [*before, (source, destination, tokens[:-1])] if len(tokens) > 1 else before


def _rounded_up_to_whole_blocks(overlaps: list[Any]) -> list[Any]:
    """The last block's tokens that do not exist are copied too."""
    *before, (source, destination, tokens) = overlaps
    return [*before, (source, destination, range(tokens.start, tokens.stop + 1))]


def _one_block_short(overlaps: list[Any]) -> list[Any]:
    return overlaps[:-1]


def _written_twice(overlaps: list[Any]) -> list[Any]:
    return [*overlaps, overlaps[-1]]


def _keys_and_values_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    right_loops, right_plan = reshard._loops, reshard.plan_copies

    def loops(*arguments: Any) -> tuple[Loop, ...]:
        layers, heads, halves = right_loops(*arguments)
        return layers, heads, replace(halves, source_stride_bytes=-halves.source_stride_bytes)

    def planned(source: Side, destination: Side, **options: Any) -> CopyPlan:
        plan = right_plan(source, destination, **options)
        moved = (replace(item, source_offset_bytes=item.source_offset_bytes + source.sharded.run_bytes) for item in plan.strided)
        return replace(plan, strided=tuple(moved))

    monkeypatch.setattr(reshard, "_loops", loops)
    monkeypatch.setattr(reshard, "plan_copies", planned)


def _strides_of_the_other_side(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reshard._loops
    monkeypatch.setattr(reshard, "_loops", lambda source, _destination, *counts: right(source, source, *counts))


def _every_owner_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reshard._shared_heads

    def shared(source: ShardedLayout, giver: Rank, destination: ShardedLayout, taker: Rank, turn: int) -> range:
        return max((right(source, giver, destination, taker, turn + more) for more in range(source.replicas)), key=len)

    monkeypatch.setattr(reshard, "_shared_heads", shared)


def _nothing_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reshard, "_merge", lambda source, _destination, tokens, loops: (tokens * source.head_dim, loops))


def _merged_too_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at the source alone."""
    right = reshard._merge

    def merge(source: KVLayout, destination: KVLayout, tokens: int, loops: tuple[Loop, ...]) -> tuple[int, tuple[Loop, ...]]:
        ratio = destination.dtype_bytes // source.dtype_bytes or 1
        alike = (replace(loop, destination_stride_bytes=loop.source_stride_bytes * ratio) for loop in loops)
        return right(source, destination, tokens, tuple(alike))

    monkeypatch.setattr(reshard, "_merge", merge)


def _block_numbers_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockTable, "__getitem__", lambda table, block: table.blocks[block % len(table.blocks)])


def _truncated_instead_of_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reshard.convert

    def convert(bits: Array, source: str, destination: str) -> Array:
        cut = source == "float32" and destination == "bfloat16"
        return (bits >> 16).astype(np.uint16) if cut else right(bits, source, destination)

    monkeypatch.setattr(reshard, "convert", convert)


MUTANTS = [
    _wrong_heads,
    _wrong_layers_on_uneven_stages,
    _patched_overlaps(_one_token_short),
    _patched_overlaps(_rounded_up_to_whole_blocks),
    _patched_overlaps(_one_block_short),
    _patched_overlaps(_written_twice),
    _keys_and_values_swapped,
    _strides_of_the_other_side,
    _every_owner_serves,
    _nothing_merged,
    _merged_too_eagerly,
    _block_numbers_from_zero,
    _truncated_instead_of_rounded,
]


def _fails(case: Case) -> bool:
    try:
        check(case)
    except (AssertionError, ValueError, TypeError, TicketRefused):  # numpy refuses arrays beyond their buffer
        return True
    return False


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_property_notices_a_wrong_planner(
    mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    search = settings(max_examples=300, phases=[Phase.generate], database=None, derandomize=True, deadline=None)
    mutant(monkeypatch)
    find(cases(), _fails, settings=search)


def test_the_search_for_a_failure_finds_none_in_the_right_planner() -> None:
    search = settings(max_examples=30, phases=[Phase.generate], database=None, derandomize=True, deadline=None)
    with pytest.raises(NoSuchExample):
        find(cases(), _fails, settings=search)
