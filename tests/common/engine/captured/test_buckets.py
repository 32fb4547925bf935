from __future__ import annotations

import pytest

from common.engine.captured.buckets import Bucket, make_buckets


@pytest.mark.parametrize("one_width", [True, False])
@pytest.mark.parametrize(("max_rows", "max_blocks"), [(1, 1), (3, 7), (8, 64), (20, 100), (256, 513)])
def test_every_batch_that_may_be_has_the_least_bucket_that_holds_it(max_rows: int, max_blocks: int, one_width: bool) -> None:
    buckets = make_buckets(max_rows, max_blocks, one_width=one_width)
    known = buckets.all()
    assert known[0] == Bucket(max_rows, max_blocks)
    assert len(set(known)) == len(known)
    assert sorted(known, reverse=True) == known
    if one_width:
        assert {bucket.blocks for bucket in known} == {max_blocks}
    for rows in range(1, max_rows + 1):
        for blocks in {1, min(2, max_blocks), max(1, max_blocks // 2), max_blocks}:
            found = buckets.bucket_for(rows, blocks)
            holding = [bucket for bucket in known if bucket.rows >= rows and bucket.blocks >= blocks]
            assert found is not None
            assert found.rows == min(bucket.rows for bucket in holding)
            assert found.blocks == min(bucket.blocks for bucket in holding)
            assert found.rows <= max(2 * rows, rows + 7)  # padding is bounded


def test_what_is_larger_than_all_has_none() -> None:
    buckets = make_buckets(16, 32, one_width=True)
    assert buckets.bucket_for(17, 1) is None
    assert buckets.bucket_for(1, 33) is None
    assert buckets.bucket_for(0, 1) is None
