"""What two scrapes say about the time between them, held against figures worked out by hand."""

from __future__ import annotations

import math

import pytest

from common.errors import EngineFailure
from deploy.top.samples import Change, added, parse, quantile

EARLIER = """
# TYPE served counter
served_total{model="a",status="200"} 10
served_total{model="b",status="200"} 5
# TYPE seconds histogram
seconds_bucket{le="0.1"} 1
seconds_bucket{le="1.0"} 2
seconds_bucket{le="+Inf"} 2
"""
LATER = """
# TYPE served counter
served_total{model="a",status="200"} 16
served_total{model="a",status="500"} 2
served_total{model="b",status="200"} 1
# TYPE waiting gauge
waiting 7
# TYPE seconds histogram
seconds_bucket{le="0.1"} 5
seconds_bucket{le="1.0"} 12
seconds_bucket{le="+Inf"} 12
"""


def change() -> Change:
    return Change(parse(EARLIER, 100.0), parse(LATER, 102.0))


def test_rates_are_per_second_and_a_process_that_began_anew_counts_from_zero() -> None:
    now = change()
    assert now.per_s("served_total", model="a") == (16 + 2 - 10) / 2
    assert now.per_s("served_total", model="b") == 1 / 2
    assert now.per_s("nothing") == 0
    assert now.grown_by("served_total", "status", model="a") == {"200": 6, "500": 2}
    assert now.later.total("waiting") == 7
    assert Change(None, now.later).per_s("served_total") is None
    assert Change(None, now.later).grown("served_total", model="a") == 18


def test_quantiles_lie_within_their_bucket_by_its_share() -> None:
    buckets = change().buckets("seconds")
    assert buckets == {0.1: 4, 1.0: 10, math.inf: 10}
    assert quantile(buckets, 0.4) == pytest.approx(0.1)
    assert quantile(buckets, 0.7) == pytest.approx(0.1 + 0.9 * 3 / 6)
    assert quantile({0.1: 0, 1.0: 0, math.inf: 3}, 0.5) == 1.0, "beyond the last bound nothing is known but that"
    assert quantile({0.1: 0, math.inf: 0}, 0.5) is None
    assert quantile({}, 0.5) is None
    assert added([buckets, buckets]) == {0.1: 8, 1.0: 20, math.inf: 20}


def test_what_is_no_exposition_is_an_error() -> None:
    with pytest.raises(EngineFailure, match="cannot be read"):
        parse("served_total{ 1", 0.0)
