"""Each broken promise is noticed within a thousand seeds."""

from __future__ import annotations

import pytest

from support.simulation import campaign
from support.simulation.mutants import MUTANTS, Mutant, broken_by

MAX_SEEDS = 1000


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_it_is_noticed(mutant: Mutant) -> None:
    with broken_by(mutant):
        assert campaign.first_failure(range(1, MAX_SEEDS + 1)) is not None, f"{mutant.__doc__} Nobody noticed."
