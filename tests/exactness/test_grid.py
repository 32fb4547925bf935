"""Every two settings that must not change an answer, together (`support.exactness_grid`). All combinations of all settings are
checked by `make exactness-grid`."""

from __future__ import annotations

import pytest

from support.exactness_grid import Grid, every_combination, few_combinations, name_of
from support.pairwise import Combination, pairs_in


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return Grid(tmp_path_factory.mktemp("grid"))


def test_few_combinations_hold_every_pair() -> None:
    every, few = every_combination(), few_combinations()
    assert len(few) < len(every) / 8
    assert set().union(*map(pairs_in, few)) == set().union(*map(pairs_in, every))


@pytest.mark.parametrize("one", few_combinations(), ids=name_of)
async def test_an_answer_is_the_same(grid: Grid, one: Combination) -> None:
    await grid.check(one)
