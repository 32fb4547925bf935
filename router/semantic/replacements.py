"""Two questions that are the same word for word, but for a few: what stands in place of what.

Where nearly all words are equal, similarity is at its highest and says nothing: one word makes the question. So a word in place
of another is taken for another question, whatever the two words are, unless it is known that they can stand for each other: forms
and spellings of one word, small words among each other, and what `INTERCHANGEABLE` lists. A name in small letters, a quality, an
opposite that nobody thought of need not be in any list for that.
"""

from __future__ import annotations

from router.semantic.reading import Reading, stem
from router.semantic.word_weights import WordWeights
from router.semantic.words import FACING, FUNCTION_WORDS, INTERCHANGEABLE, NUMBER_WORDS, QUESTION_WORDS, UNITS

_FEW = 0.25  # of the words; one in any case
_LONGEST_SPAN = 3
_MISSPELLED_LETTERS = 6  # shorter words are other words if a letter differs

_VOWELS = frozenset("aeiouy")

_GROUPS: dict[str, set[int]] = {}
for _number, _group in enumerate(INTERCHANGEABLE):
    for _word in _group:
        _GROUPS.setdefault(stem(_word), set()).add(_number)


def other_word(question: Reading, candidate: Reading, weights: WordWeights) -> bool:
    """Whether a few words in place of others are all the difference, and not all of them can stand for each other."""
    mine, theirs = question.words, candidate.words
    few = max(1, int(_FEW * max(len(mine), len(theirs))))
    if len(mine) != len(theirs):
        return _other_span(mine, theirs, few)
    replaced = [(one, other) for one, other in zip(mine, theirs, strict=True) if one != other]
    return 0 < len(replaced) <= few and not all(_interchangeable(one, other, weights) for one, other in replaced)


def other_question_word(question: Reading, candidate: Reading) -> bool:
    """Whether all the difference is what is asked for: "why" in place of "how"."""
    if len(question.words) != len(candidate.words):
        return False
    replaced = [(one, other) for one, other in zip(question.words, candidate.words, strict=True) if one != other]
    if len(replaced) != 1:
        return False
    one, other = (QUESTION_WORDS.get(word) for word in replaced[0])
    return one is not None and other is not None and one != other


def changed_places(question: Reading, candidate: Reading) -> bool:
    """Whether two topical words have changed places and all others have kept theirs: "do cats hunt dogs", "do dogs hunt cats".

    Not where they stand beside each other or are joined by a word that joins equals ("and", "or", "between").
    """
    if len(question.words) != len(candidate.words):
        return False
    places = [place for place, pair in enumerate(zip(question.words, candidate.words, strict=True)) if pair[0] != pair[1]]
    if len(places) != 2:
        return False
    first, second = places
    between = question.words[first + 1 : second]
    if not between or not _JOINING.isdisjoint(between):
        return False
    one, other = question.words[first], question.words[second]
    return (candidate.words[first], candidate.words[second]) == (other, one) and not {one, other} & FUNCTION_WORDS


_JOINING = frozenset(("and", "or", "vs", "versus", "v", "with"))


def _other_span(mine: tuple[str, ...], theirs: tuple[str, ...], few: int) -> bool:
    """Some words for some other words, in one place: "new york" for "boston"."""
    shorter = min(len(mine), len(theirs))
    front = next((place for place in range(shorter) if mine[place] != theirs[place]), shorter)
    back = next((place for place in range(shorter - front) if mine[-1 - place] != theirs[-1 - place]), shorter - front)
    one, other = mine[front : len(mine) - back], theirs[front : len(theirs) - back]
    if not one or not other or max(len(one), len(other)) > min(max(2, few), _LONGEST_SPAN):
        return False
    only_one, only_other = _topics(one), _topics(other)
    if _initials(one, other) or _initials(other, one):
        return False
    return bool(only_one - only_other) and bool(only_other - only_one)


def _topics(words: tuple[str, ...]) -> set[str]:
    return {stem(word) for word in words if word not in FUNCTION_WORDS}


def _initials(short: tuple[str, ...], long: tuple[str, ...]) -> bool:
    return len(short) == 1 and short[0] in ("".join(word[0] for word in long), "".join(long))


def _interchangeable(one: str, other: str, weights: WordWeights) -> bool:
    if (one, other) in FACING or (other, one) in FACING:
        return False
    if (_is_number(one) and _is_number(other)) or (one in UNITS and other in UNITS):
        return True  # what they say was compared as numbers and units
    if one in FUNCTION_WORDS and other in FUNCTION_WORDS:
        return True
    root, other_root = stem(one), stem(other)
    if root == other_root or not _GROUPS.get(root, set()).isdisjoint(_GROUPS.get(other_root, ())):
        return True
    known = weights.of(root) < 1.0 and weights.of(other_root) < 1.0
    return not known and _misspelled(one, other)


def _is_number(word: str) -> bool:
    return word in NUMBER_WORDS or word[-1].isdigit() or word[0].isdigit()


def _misspelled(one: str, other: str) -> bool:
    """One letter more, less, another or two in turn, in the middle: at the ends it makes another word (a-theist, employ-er)."""
    short, long = sorted((one, other), key=len)
    if len(short) < _MISSPELLED_LETTERS or len(long) > len(short) + 1 or not (one.isalpha() and other.isalpha()):
        return False
    if short[0] != long[0] or not (short[-1] == long[-1] or {short[-1], long[-1]} <= _VOWELS):
        return False
    place = next((at for at, letter in enumerate(short) if letter != long[at]), len(short))
    if len(long) > len(short):
        return short[place:] == long[place + 1 :]
    in_turn = short[place : place + 2] == long[place : place + 2][::-1] and short[place + 2 :] == long[place + 2 :]
    return in_turn or short[place + 1 :] == long[place + 1 :]
