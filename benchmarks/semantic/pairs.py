"""A file of question pairs as classes of questions with one meaning, split so that what trains never meets what is judged.

Two questions are of one class if a chain of pairs marked as the same joins them. The split goes by components over *all* pairs,
marked as the same or as different, so that no question of one side has ever been compared with one of the other.
"""

from __future__ import annotations

import csv
import gzip
import random
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Questions:
    texts: list[str]
    classes: list[int]  # by question
    different: list[tuple[int, int]]  # pairs that are marked so

    def of_class(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = defaultdict(list)
        for question, kind in enumerate(self.classes):
            found[kind].append(question)
        return found


def load(path: Path) -> tuple[Questions, list[int]]:
    """All questions, and for each one the component over all pairs that it belongs to."""
    numbers: dict[str, int] = {}
    pairs: list[tuple[int, int, bool]] = []
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            if len(row) != 3 or row[2] not in ("0", "1"):
                continue
            one, other = (numbers.setdefault(_unquoted(text), len(numbers)) for text in row[:2])
            pairs.append((one, other, row[2] == "1"))
    classes = _components(len(numbers), [(one, other) for one, other, same in pairs if same])
    components = _components(len(numbers), [(one, other) for one, other, _ in pairs])
    different = [(one, other) for one, other, same in pairs if not same and classes[one] != classes[other]]
    return Questions(list(numbers), classes, different), components


def split(questions: Questions, components: list[int], train_share: float) -> tuple[list[int], list[int]]:
    """Questions to train on and questions to judge by."""
    sides: tuple[list[int], list[int]] = ([], [])
    for question, component in enumerate(components):
        trains = zlib.crc32(b"split" + questions.texts[component].encode()) % 1000 < 1000 * train_share
        sides[0 if trains else 1].append(question)
    return sides


def stream(questions: Questions, allowed: list[int], length: int, seed: int, *, single_share: float = 0.15) -> list[int]:
    """Questions in random order: whole classes, and questions that resemble one of theirs but are marked as different."""
    dice = random.Random(seed)
    inside = set(allowed)
    members = {kind: found for kind, found in questions.of_class().items() if len(found) > 1 and found[0] in inside}
    # Classes of two would be most of the stream; traffic that a cache is for repeats itself more.
    big = [kind for kind, found in members.items() if len(found) >= 3]
    small = [kind for kind, found in members.items() if len(found) == 2]
    dice.shuffle(big)
    dice.shuffle(small)
    chosen: list[int] = []
    wanted = int(length * (1.0 - single_share))
    big_wanted = int(wanted * 0.75)
    for kinds, limit in ((big, big_wanted), (small, wanted), (big, wanted)):
        while kinds and len(chosen) < limit:
            chosen += members[kinds.pop()]
    taken = set(chosen)
    rivals = list(dict.fromkeys(
        other
        for pair in questions.different
        for one, other in (pair, pair[::-1])
        if one in taken and other not in taken and other in inside and questions.classes[other] not in members
    ))  # fmt: skip
    dice.shuffle(rivals)
    chosen += rivals[: length - len(chosen)]
    dice.shuffle(chosen)
    return chosen[:length]


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1]
    while '""' in text:
        text = text.replace('""', '"')
    return " ".join(text.split())


def _components(size: int, links: list[tuple[int, int]]) -> list[int]:
    parents = list(range(size))

    def root(node: int) -> int:
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    for one, other in links:
        parents[root(one)] = root(other)
    return [root(node) for node in range(size)]
