"""Parts of a step that goes on from the one before: nothing is lost or turned round, and who has a place keeps it."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from common.engine.batch import ForwardResult, SampleSpec, ScheduledBatch, SequenceSlice, SliceResult
from common.engine.parallel.micro_batches import Part, divide, join, num_micro_batches
from common.types import SampledToken, TokenLogprob

SAMPLE = SampleSpec(position=0, seed=0, choice=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=None)


@st.composite
def slices(draw: st.DrawFn) -> tuple[SequenceSlice, int | None]:
    """With its home: only what is one token has one."""
    home = draw(st.none() | st.integers(0, 5))
    if home is not None:
        return SequenceSlice([-1 - draw(st.integers(0, 20))], draw(st.integers(0, 99)), [1], (SAMPLE,)), home
    count = draw(st.integers(1, 30))
    tokens = draw(st.lists(st.integers(0, 999), min_size=count, max_size=count))
    num_drafts = draw(st.integers(0, min(4, count - 1)))
    samples = (SAMPLE,) * (num_drafts + 1) if num_drafts else draw(st.sampled_from([(), (SAMPLE,)]))
    reports = {"prompt_logprobs": 1, "next_token_ids": tokens[1:]} if not num_drafts and draw(st.booleans()) else {}
    item = SequenceSlice(tokens, draw(st.integers(0, 99)), [1, 2], samples, num_drafts=num_drafts, **reports)  # type: ignore[arg-type]
    return item, None


steps = st.lists(slices(), min_size=1, max_size=12)


def pieces(parts: list[Part], index: int) -> list[SequenceSlice]:
    return [item for part in parts for place, item in zip(part.indexes, part.batch.slices, strict=True) if place == index]


@given(step=steps, count=st.integers(1, 6))
def test_every_row_is_in_one_part_and_behind_those_before_it(step: list[tuple[SequenceSlice, int | None]], count: int) -> None:
    batch = ScheduledBatch(tuple(item for item, _ in step), keeps_rows=True)
    parts = divide(batch, count, [home for _, home in step])
    assert len(parts) <= count
    assert all(part.batch.num_tokens and part.batch.keeps_rows for part in parts)
    assert all(list(part.indexes) == sorted(set(part.indexes)) for part in parts)
    for index, (item, _) in enumerate(step):
        found = pieces(parts, index)
        assert [token for piece in found for token in piece.token_ids] == list(item.token_ids)
        assert [token for piece in found for token in piece.next_token_ids] == list(item.next_token_ids)
        assert [piece.start - item.start for piece in found] == [
            sum(len(before.token_ids) for before in found[:place]) for place in range(len(found))
        ]
        assert all(not piece.samples and not piece.num_drafts for piece in found[:-1])
        assert (found[-1].samples, found[-1].num_drafts) == (item.samples, item.num_drafts)
        assert len(found[-1].token_ids) > item.num_drafts  # what is drawn from together is together
        assert all(len(piece.next_token_ids) <= len(piece.token_ids) for piece in found)


@given(step=steps, count=st.integers(1, 6))
def test_what_comes_of_parts_is_what_comes_of_the_step(step: list[tuple[SequenceSlice, int | None]], count: int) -> None:
    """As if each row reported itself, and the last row of a slice that samples were its token."""

    def computed(batch: ScheduledBatch) -> ForwardResult:
        found = []
        for item in batch.slices:
            reports = tuple(TokenLogprob(token, item.start + place, ()) for place, token in enumerate(item.next_token_ids))
            tokens = (SampledToken(item.start + len(item.token_ids)),) if item.samples else ()
            found.append(SliceResult(tokens, reports))
        return ForwardResult(tuple(found))

    batch = ScheduledBatch(tuple(item for item, _ in step))
    parts = divide(batch, count, [home for _, home in step])
    assert join(parts, [computed(part.batch) for part in parts], len(step)) == computed(batch)


@given(sizes=st.lists(st.integers(0, 30), min_size=2, max_size=5), late=st.integers(0, 40))
def test_who_has_a_place_is_moved_forward_only_out_of_a_part_that_is_too_large(sizes: list[int], late: int) -> None:
    """Nobody waits for a token of a later part without need; newcomers take the places of those who left."""
    homes: list[int | None] = [home for home, size in enumerate(sizes) for _ in range(size)]
    homes += [None] * late
    if not homes:
        return
    count = len(sizes)
    batch = ScheduledBatch(tuple(SequenceSlice([0], 0, [1], (SAMPLE,)) for _ in homes))
    parts = divide(batch, min(count, len(homes)), homes)
    quota = -(-len(homes) // min(count, len(homes)))
    loads = Counter(home for home in homes if home is not None)
    now = {index: number for number, part in enumerate(parts) for index in part.indexes}
    forward = [index for index, home in enumerate(homes) if home is not None and now[index] < min(home, len(parts) - 1)]
    if max(loads.values(), default=0) < quota:
        assert not forward
    assert max(part.batch.num_tokens for part in parts) <= quota + quota // 4 + 1


def test_a_steady_step_is_cut_as_the_one_before_was() -> None:
    batch = ScheduledBatch(tuple(SequenceSlice([0], 0, [1], (SAMPLE,)) for _ in range(10)))
    first = divide(batch, 2)
    homes = [next(number for number, part in enumerate(first) if index in part.indexes) for index in range(10)]
    assert [part.indexes for part in divide(batch, 2, homes)] == [part.indexes for part in first]


@given(tokens=st.integers(1, 10_000), stages=st.integers(1, 8), least=st.integers(1, 600))
def test_a_step_that_goes_on_has_as_many_parts_as_stages_if_it_can(tokens: int, stages: int, least: int) -> None:
    count = num_micro_batches(tokens, stages, least, goes_on=True)
    assert 1 <= count <= max(1, 2 * stages)
    assert count >= stages or tokens < stages * max(1, least // 4)
    assert count == 1 or tokens // count >= least // 4
    assert count >= num_micro_batches(tokens, stages, least)
