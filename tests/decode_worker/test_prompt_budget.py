"""The division of a step's rows among prompts: what the docstring promises, for any lengths."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from decode_worker.prompt_budget import divide


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(-3, 40), lengths=st.lists(st.integers(2, 60), max_size=8))
def test_rows_are_all_used_and_the_first_gets_half(rows: int, lengths: list[int]) -> None:
    shares = divide(rows, lengths)
    assert sum(shares) == max(0, min(rows, sum(lengths)))
    assert all(0 <= share <= length for share, length in zip(shares, lengths, strict=True))
    if lengths and rows > 0:
        assert shares[0] >= min(lengths[0], rows / 2)


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(2, 20), lengths=st.lists(st.integers(2, 60), min_size=1, max_size=7))
def test_short_prompts_wait_for_shorter_ones_only_and_the_first_takes_twice_its_time_at_most(
    rows: int, lengths: list[int]
) -> None:
    left, steps, ended = list(enumerate(lengths)), 0, {}
    while left:
        steps += 1
        shares = divide(rows, [length for _, length in left])
        left = [(index, length - share) for (index, length), share in zip(left, shares, strict=True)]
        ended.update({index: steps for index, length in left if not length})
        left = [(index, length) for index, length in left if length]
    assert ended[0] <= -(-2 * lengths[0] // rows)
    for index, length in enumerate(lengths[1:], start=1):
        # As long as the first is longer than what this one has left, it takes nothing of the half that goes to shorter ones.
        if length + sum(other for place, other in enumerate(lengths) if place != index and other <= length) < lengths[0] / 2:
            shorter = sum(other for place, other in enumerate(lengths) if place not in (0, index) and other <= length)
            assert ended[index] <= -(-(shorter + length) // (rows // 2))


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    assert divide(10, [100, 4, 50, 3]) == [5, 2, 0, 3]
    assert divide(10, [3, 50, 20]) == [3, 7, 0]
