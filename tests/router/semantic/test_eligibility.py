"""Which questions never reach the index."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.cache.semantic_port import Question
from router.sampling_class import SamplingClass
from router.semantic.eligibility import Ineligible, ineligible, ineligible_at_once
from router.semantic.reading import read

ASKED = Question(b"k", (), b"s", "", "t", "m", SamplingClass.GREEDY, 16, 0, False)


def reason(text: str, **more: object) -> Ineligible | None:
    question = replace(ASKED, text=text, **more)
    return ineligible_at_once(question) or ineligible(question, read(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is the weather in Rome?", Ineligible.TIME),
        ("Who is the president now?", Ineligible.TIME),
        ("Send this to jane.doe@example.org please", Ineligible.SECRET),
        ("Why does sk-abcdefghijkl1234567890 not work?", Ineligible.SECRET),
        ("Is 4111 1111 1111 1111 a valid card?", Ineligible.SECRET),
        ("my password is hunter2, is that safe?", Ineligible.SECRET),
        ("What can I do about my diagnosis?", Ineligible.SECRET),
        ("Call +44 20 7946 0958 for me", Ineligible.SECRET),
        ("how to " + "really " * 1500 + "sleep", Ineligible.LENGTH),
        ("hello", Ineligible.LENGTH),
        ("今日の天気はどうですか", Ineligible.LENGTH),
        ("Как приготовить вкусный борщ дома", Ineligible.SCRIPT),
        ("What is the capital of France?", None),
        ("Wie koche ich Spätzle für Gäste?", None),
        ("How do I read a file of 123456 lines?", None),
    ],
)
def test_questions_of_a_first_turn(text: str, expected: Ineligible | None) -> None:
    assert reason(text) is expected


@pytest.mark.parametrize(
    "text", ["And what about Spain?", "What does it mean for us all?", "... and then what happened there?", "Why is that?"]
)
def test_later_turns_that_lean_on_earlier_ones(text: str) -> None:
    assert reason(text, num_earlier_messages=2) is Ineligible.FOLLOW_UP


def test_a_later_turn_that_stands_by_itself() -> None:
    assert reason("What is the capital city of France?", num_earlier_messages=2) is None


def test_tools_rule_it_out() -> None:
    assert reason("What is the capital of France?", has_tools=True) is Ineligible.TOOLS
