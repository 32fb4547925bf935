"""Whether two answers say the same. The seam, and a judge that looks at the texts alone.

None means that it cannot tell: then there is no label, which is better than a wrong one.
"""

from __future__ import annotations

import re
from typing import Protocol

from router.semantic.reading import Reading, read
from router.semantic.words import OPPOSITES

_SAME = 0.7
_DIFFERENT = 0.2
_SHORT_WORDS = 12
_MAX_CHARS = 4_000
_BLOCK = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)
_YES = frozenset(("yes", "yeah", "yep", "correct", "true", "certainly", "absolutely"))
_NO = frozenset(("no", "nope", "incorrect", "false", "not", "never"))


class Judge(Protocol):
    def same(self, answer: str, other: str) -> bool | None:
        """Must neither wait nor raise."""
        ...


class TextJudge:
    """Equal texts, then what answers turn on (yes or no, numbers, code), then the words that they share."""

    def same(self, answer: str, other: str) -> bool | None:
        answer, other = answer[:_MAX_CHARS], other[:_MAX_CHARS]
        if _plain(answer) == _plain(other):
            return True
        one, two = read(answer), read(other)
        if not one.words or not two.words:
            return None
        yes, other_yes = _yes_or_no(one), _yes_or_no(two)
        if None not in (yes, other_yes) and yes is not other_yes:
            return False
        blocks, other_blocks = _BLOCK.findall(answer), _BLOCK.findall(other)
        if blocks and other_blocks and [_plain(block) for block in blocks] == [_plain(block) for block in other_blocks]:
            return True
        short = max(len(one.words), len(two.words)) <= _SHORT_WORDS
        if short and one.numbers != two.numbers and one.numbers and two.numbers:
            return False
        union = one.stems | two.stems
        shared = len(one.stems & two.stems) / len(union) if union else 0.0
        if shared <= _DIFFERENT:
            return False
        clash = one.numbers != two.numbers or one.negations % 2 != two.negations % 2 or _opposed(one, two)
        return True if shared >= _SAME and not clash else None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _yes_or_no(reading: Reading) -> bool | None:
    opening = reading.words[0]
    return True if opening in _YES else False if opening in _NO else None


def _opposed(one: Reading, two: Reading) -> bool:
    mine, theirs = set(one.words), set(two.words)
    return any(not (theirs - mine).isdisjoint(OPPOSITES.get(word, ())) for word in mine - theirs)
