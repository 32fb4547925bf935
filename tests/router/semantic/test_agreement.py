"""Known questions with one answer vouch for each other: how families come about, and what they say of a candidate."""

from __future__ import annotations

import asyncio
import math
import random

import numpy as np
import pytest

from common.rpc import cancel_and_wait
from router.semantic.agreement import NAMES, agreement
from router.semantic.decider import Decider
from router.semantic.embedder import HashedEmbedder
from router.semantic.matching import Known, Matcher, Scope
from router.semantic.prior import Prior, shipped, word_weights
from router.semantic.reading import read
from support.semantic import SemanticBench, question

ASKED = "How do I learn to play the piano at home?"
SAME = "How can I learn to play piano at home?"
ALSO = "How could I learn to play the piano at home?"
ANSWER = "Practise every day with a good book."
OTHER = "The treaty was signed by both kings."


@pytest.mark.parametrize(
    ("place", "nearest", "size", "others", "gap", "many"),
    [
        (0, [(b"a", 0.9)], 1, 0.0, 9.0, 0.0),  # nothing else is near
        (0, [(b"a", 0.9), (b"b", 0.88), (b"b", 0.7)], 1, 0.0, 0.2, 0.0),
        (0, [(b"a", 0.9), (b"a", 0.88), (b"b", 0.7)], 5, 0.5, 2.0, math.log(5)),  # the next one has the same answer
        (1, [(b"a", 0.9), (b"b", 0.88), (b"a", 0.87), (b"b", 0.6)], 2, 0.5, -0.2, math.log(2)),  # another is nearer
        (0, [(b"a", 0.9)] * 8, 40, 2.0, 9.0, math.log(40)),  # no more than four others count
    ],
)
def test_what_those_near_say(
    place: int, nearest: list[tuple[bytes, float]], size: int, others: float, gap: float, many: float
) -> None:
    said = agreement(place, nearest, size, 1_000)
    assert said == pytest.approx([others, gap, many, math.log(1_000) - 8.0])
    assert len(said) == len(NAMES)


def test_from_a_hundred_on_it_says_how_many_are_known() -> None:
    said = [agreement(0, [(b"a", 0.9)], 1, known)[3] for known in (1, 100, 101, 10_000)]
    assert said[0] == said[1] < said[2] < said[3]


def test_a_scope_counts_its_families() -> None:
    scope = Scope(2)
    vector = np.array([1.0, 0.0], np.float32)
    for number in range(3):
        scope.add(Known(bytes([number]), read(ASKED), "", family=b"f"), vector)
    scope.add(Known(b"alone", read(ASKED), ""), vector)
    assert (scope.family_size(b"f"), scope.family_size(b"alone"), scope.family_size(b"none")) == (3, 1, 0)
    scope.add(Known(bytes([0]), read(ASKED), ""), vector)  # found to say something else, when it was answered again
    assert scope.remove(bytes([1]))
    assert not scope.remove(bytes([1]))
    assert (scope.family_size(b"f"), scope.family_size(bytes([0]))) == (1, 1)


def test_a_match_tells_the_model_of_families() -> None:
    file = shipped()
    prior, weights = Prior(file, "hashed-1"), word_weights(file)
    matcher = Matcher(prior, weights, Decider(prior, max_wrong_hits=0.05, shadow_share=0.0, dice=random.Random(0)))
    embedder = HashedEmbedder(weights)

    def said(family: bytes) -> list[float]:
        scope = Scope(embedder.dimensions)
        scope.add(Known(b"one", read(ASKED), ""), embedder.embed(ASKED, read(ASKED)))
        scope.add(Known(b"two", read(ALSO), "", family=family), embedder.embed(ALSO, read(ALSO)))
        best = matcher.match(scope, b"q", read(SAME), embedder.embed(SAME, read(SAME))).best
        assert best is not None
        return [float(value) for value in best.row[-5:-2]]

    others, gap, many = said(b"one")
    assert (others, many) == pytest.approx((0.5, math.log(2)))
    alone, narrow, none = said(b"")
    assert (alone, none) == (0.0, 0.0)
    assert abs(narrow) < gap  # what made the gap narrow has the same answer


async def family_sizes(bench: SemanticBench) -> list[int]:
    """Of the families of all questions that are known."""
    scope = bench.cache._library.scope(b"scope")
    assert scope is not None
    known = [one for one, _ in scope.nearest(bench.vector(ASKED), 10)]
    return sorted(scope.family_size(one.family) for one in known)


async def test_who_is_answered_alike_is_of_one_family() -> None:
    bench = SemanticBench(proven=False, max_wrong_hits=0.0001)
    for text in (ASKED, SAME, ALSO):
        assert await bench.ask(text, ANSWER) is None
    assert bench.labels() == {("fresh", "right"): 2}
    assert await family_sizes(bench) == [3, 3, 3]


async def test_who_is_answered_otherwise_is_not() -> None:
    bench = SemanticBench(proven=False, max_wrong_hits=0.0001)
    for text, answer in ((ASKED, ANSWER), (SAME, OTHER)):
        assert await bench.ask(text, answer) is None
    assert bench.labels() == {("fresh", "wrong"): 1}
    assert await family_sizes(bench) == [1, 1]


async def test_other_routers_are_told() -> None:
    one = SemanticBench(proven=False, max_wrong_hits=0.0001)
    other = SemanticBench(proven=False, max_wrong_hits=0.0001, store=one.store, clock=one.clock)
    task = asyncio.create_task(other.cache.run())
    for text in (ASKED, SAME):
        await one.ask(text, ANSWER)
    async with asyncio.timeout(120):
        while len(other.cache._library) < 2:
            await asyncio.sleep(0)
    assert await family_sizes(other) == [2, 2]
    await cancel_and_wait(task)
    assert await other.cache.find(question(SAME)) is None
