"""Which rows a range is, and how sums of rows become the contents of ranges. The rest needs a GPU."""

from __future__ import annotations

import pytest
import torch

from common.engine.device_memory import rows_of, sums_of_ranges
from common.errors import EngineFailure


def test_ranges_are_rows_in_order() -> None:
    assert rows_of([(64, 64), (0, 32), (160, 32)], 32) == [2, 3, 0, 5]
    for wrong in ((16, 32), (32, 16)):
        with pytest.raises(EngineFailure):
            rows_of([wrong], 32)


def test_all_ranges_are_summed_at_once_and_cut_apart() -> None:
    asked = []

    def sum_rows(rows: torch.Tensor) -> torch.Tensor:
        asked.append(rows.tolist())
        return torch.stack((rows, -rows), dim=1)

    contents = sums_of_ranges([(64, 64), (0, 32)], 32, sum_rows)
    assert asked == [[2, 3, 0]]
    assert contents == [torch.tensor(pair).numpy().tobytes() for pair in ([2, -2, 3, -3], [0, 0])]
