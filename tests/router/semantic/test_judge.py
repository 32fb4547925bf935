"""Whether two answers say the same, where that can be told."""

from __future__ import annotations

import pytest

from router.semantic.judge import TextJudge


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("Paris.", "paris", True),
        ("The capital of France is Paris.", "Paris is the capital of France.", True),
        ("Yes, you can do that.", "No, you can not do that.", False),
        ("It is 42.", "It is 41.", False),
        ("The war began in 1914 in Europe.", "The war began in 1939 in Europe.", False),
        ("Use this:\n```py\nx = 1\n```", "Here it is:\n```\nx = 1\n```", True),
        ("Boil the potatoes with salt until soft.", "The treaty was signed by both kings.", False),
        ("Turn the knob until the light goes on and wait.", "Turn the knob until the light goes off and wait.", None),
        ("", "Something else entirely.", None),
    ],
)
def test_verdicts(one: str, other: str, expected: bool | None) -> None:
    assert TextJudge().same(one, other) is expected
    assert TextJudge().same(other, one) is expected
