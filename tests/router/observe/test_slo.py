"""Which requests kept their promise, which did not, and which say nothing."""

from __future__ import annotations

import pytest

from common.config import Config, SloConfig
from common.errors import ConfigError
from router.observe.slo import kept

BOTH = SloConfig(ttft_s=1.0, tpot_s=0.1)


@pytest.mark.parametrize(
    ("status", "ttft_s", "tpot_s", "total_s", "expected"),
    [
        (200, 0.9, 0.09, 5.0, True),
        (200, 1.0, 0.1, 5.0, True),
        (200, 1.1, 0.09, 5.0, False),
        (200, 0.9, 0.11, 5.0, False),
        (200, 0.9, None, 5.0, True),  # one token
        (429, None, None, 0.0, False),
        (503, None, None, 0.0, False),
        (500, 0.5, None, 1.0, False),  # after the first token
        (400, None, None, 0.1, None),
        (404, None, None, 9.0, None),
        (499, None, None, 0.5, None),  # left while there was time
        (499, None, None, 1.5, False),  # left because there was none
        (499, 0.5, 0.01, 9.0, None),
        (499, 0.5, 0.2, 9.0, False),
    ],
)
def test_a_promise(status: int, ttft_s: float | None, tpot_s: float | None, total_s: float, expected: bool | None) -> None:
    assert kept(BOTH, status=status, ttft_s=ttft_s, tpot_s=tpot_s, total_s=total_s) is expected


def test_what_is_not_promised_is_not_looked_at() -> None:
    assert kept(SloConfig(ttft_s=1.0), status=200, ttft_s=0.5, tpot_s=99.0, total_s=99.0) is True
    assert kept(SloConfig(tpot_s=1.0), status=200, ttft_s=50.0, tpot_s=0.5, total_s=99.0) is True


def test_a_promise_of_nothing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="ttft_s or tpot_s"):
        SloConfig()
    with pytest.raises(ValueError, match="slo"):
        Config.model_validate({"models": [{"name": "m", "source": "m"}], "router": {"slo": {"urgent": {"ttft_s": 1}}}})
    assert issubclass(ConfigError, Exception)
