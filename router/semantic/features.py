"""A question held against a candidate, as numbers for a model. `NAMES` gives their order, which a stored model depends on."""

from __future__ import annotations

import math
from typing import Final

from router.semantic.reading import Reading
from router.semantic.word_weights import WordWeights
from router.semantic.words import FUNCTION_WORDS

NAMES: Final = (
    "cosine",
    "cosine squared",
    "cosine above 0.9",
    "gap to the next candidate",
    "weighted Jaccard",
    "weighted containment",
    "Jaccard of all words",
    "weight of what only the question says",
    "weight of what only the candidate says",
    "heaviest word on one side",
    "second heaviest word on one side",
    "lightest word on one side",
    "one word in place of another",
    "heaviest replaced word",
    "words in the same order",
    "same topic words",
    "pairs of words in common",
    "names differ",
    "names on one side",
    "question words differ",
    "one side asks no question word",
    "numbers present",
    "length difference",
    "shorter length",
    "log of the candidate's labels",
    "share of right labels of the candidate",
)
NUM_FEATURES: Final = len(NAMES)


def features(
    question: Reading,
    candidate: Reading,
    weights: WordWeights,
    *,
    cosine: float,
    gap: float,
    num_right: float = 0.0,
    num_labels: float = 0.0,
) -> list[float]:
    """`gap` is how much nearer the candidate is than the next one; labels are those that its entry has had."""
    mine, theirs = question.stems - candidate.stems, candidate.stems - question.stems
    both = question.stems & candidate.stems
    of = weights.of
    common = sum(of(word) for word in both)
    only_mine, only_theirs = (
        sorted((of(word) for word in mine), reverse=True),
        sorted((of(word) for word in theirs), reverse=True),
    )
    union = common + sum(only_mine) + sum(only_theirs)
    smaller = common + min(sum(only_mine), sum(only_theirs))
    one_sided = sorted(only_mine + only_theirs, reverse=True)
    words, other_words = set(question.words), set(candidate.words)
    first_pairs = set(zip(question.content, question.content[1:], strict=False))
    second_pairs = set(zip(candidate.content, candidate.content[1:], strict=False))
    num_pairs = len(first_pairs | second_pairs)
    swapped = len(mine) == 1 and len(theirs) == 1
    names_mine, names_theirs = question.names - candidate.stems, candidate.names - question.stems
    lengths = sorted((len(question.words), len(candidate.words)))
    common_words = words & other_words
    function_difference = len((words ^ other_words) & FUNCTION_WORDS)
    return [
        cosine,
        cosine * cosine,
        max(0.0, cosine - 0.9) * 10.0,
        gap,
        common / union if union else 1.0,
        common / smaller if smaller else 1.0,
        len(common_words) / max(1, len(words | other_words)),
        sum(only_mine),
        sum(only_theirs),
        one_sided[0] if one_sided else 0.0,
        one_sided[1] if len(one_sided) > 1 else 0.0,
        one_sided[-1] if one_sided else 0.0,
        float(swapped),
        max(only_mine[0], only_theirs[0]) if swapped else 0.0,
        float(_ordered_alike(question, candidate)),
        float(not mine and not theirs),
        len(first_pairs & second_pairs) / num_pairs if num_pairs else 1.0,
        float(bool(names_mine) and bool(names_theirs)),
        float(bool(names_mine) != bool(names_theirs)),
        float(question.asks != candidate.asks),
        float((question.asks == "") != (candidate.asks == "")),
        float(bool(question.numbers)),
        math.log((1 + lengths[1]) / (1 + lengths[0])),
        math.log(1 + lengths[0]) + 0.1 * function_difference,
        math.log1p(num_labels),
        (num_right + 1.0) / (num_labels + 2.0),
    ]


def _ordered_alike(question: Reading, candidate: Reading) -> bool:
    common = question.stems & candidate.stems
    return [word for word in question.content if word in common] == [word for word in candidate.content if word in common]
