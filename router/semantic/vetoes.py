"""Differences between two questions after which one answer can never serve both, whatever a model thinks of them.

Unconditional: no evidence switches a veto off. Two questions may differ in words; not in numbers with their units, dates and
versions, in whether they negate, in opposites, in code and quotations, nor in whom or what they name.
"""

from __future__ import annotations

import enum
from difflib import SequenceMatcher

from router.semantic.reading import Reading, stem
from router.semantic.replacements import changed_places, other_question_word, other_word
from router.semantic.word_weights import WordWeights
from router.semantic.words import DIRECTION_WORDS, FUNCTION_WORDS, OPPOSITES, UNITS

_RARE = 0.72  # a word that fewer than one of a thousand questions has
_RARE_IF_SWAPPED = 0.45  # one of a hundred: where one word in place of another is all the difference
_ALIKE = 0.8
_UNIT_STEMS = frozenset(stem(form) for form in UNITS)  # judged with the numbers


class Veto(enum.StrEnum):
    NUMBERS = "numbers"  # also units, dates, versions
    NEGATION = "negation"
    OPPOSITE = "opposite"
    CODE = "code"  # also paths, flags, quoted strings
    NAMES = "names"
    TOPIC = "topic"  # a rare word in place of another one, in small letters too
    WORD = "word"  # any word in place of another one, where that is all the difference
    ORDER = "order"
    QUESTION_WORD = "question-word"


def veto(question: Reading, candidate: Reading, weights: WordWeights) -> Veto | None:
    """The first reason why the candidate's answer must not be given to the question."""
    if question.numbers != candidate.numbers or (question.units and candidate.units and question.units != candidate.units):
        return Veto.NUMBERS
    if question.negations % 2 != candidate.negations % 2:
        return Veto.NEGATION
    if _unmatched(question.code, candidate) or _unmatched(candidate.code, question):
        return Veto.CODE
    if _opposed(question, candidate):
        return Veto.OPPOSITE
    if _names_replaced(question, candidate):
        return Veto.NAMES
    if _topic_replaced(question, candidate, weights):
        return Veto.TOPIC
    if _order_turned(question, candidate) or changed_places(question, candidate):
        return Veto.ORDER
    if other_question_word(question, candidate):
        return Veto.QUESTION_WORD
    if other_word(question, candidate, weights):
        return Veto.WORD
    if question.asks != candidate.asks and "" not in (question.asks, candidate.asks) and _exact_kind(question, candidate):
        return Veto.QUESTION_WORD
    return None


def _unmatched(code: frozenset[str], other: Reading) -> bool:
    """Whether some code or quotation has no counterpart. Mere words may be written there without quotes and capitals."""
    missing = code - other.code
    if not missing:
        return False
    said = f" {' '.join(other.words)} "
    return any(not _is_words(item) or f" {item.lower()} " not in said for item in missing)


def _is_words(text: str) -> bool:
    return all(letter.isalpha() or letter == " " for letter in text)


def _opposed(question: Reading, candidate: Reading) -> bool:
    mine, theirs = set(question.words), set(candidate.words)
    only_theirs = theirs - mine
    return any(not only_theirs.isdisjoint(OPPOSITES.get(word, ())) for word in mine - theirs)


def _names_replaced(question: Reading, candidate: Reading) -> bool:
    """Each names something that the other does not mention at all, in capitals or not."""
    mine = question.names - candidate.stems
    theirs = candidate.names - question.stems
    if not mine and not theirs:
        return False
    if mine and theirs:
        return not _abbreviates(mine, candidate) and not _abbreviates(theirs, question)
    # A name on one side only may be dropped; a name in place of another word is a replacement, in small letters too.
    named, other = (mine, candidate.stems - question.stems) if mine else (theirs, question.stems - candidate.stems)
    return len(other) == len(named) and len(question.content) == len(candidate.content)


def _topic_replaced(question: Reading, candidate: Reading, weights: WordWeights) -> bool:
    """Each has a rare word that the other lacks, and neither is a way of writing the other."""
    mine, theirs = question.stems - candidate.stems - _UNIT_STEMS, candidate.stems - question.stems - _UNIT_STEMS
    swapped = len(mine) == len(theirs) == 1 and len(question.words) == len(candidate.words)
    least = _RARE_IF_SWAPPED if swapped else _RARE
    mine = frozenset(word for word in mine if weights.of(word) >= least)
    theirs = frozenset(word for word in theirs if weights.of(word) >= least)
    if not mine or not theirs or _abbreviates(mine, candidate) or _abbreviates(theirs, question):
        return False
    return not all(any(_spelled_alike(word, other) for other in theirs) for word in mine)


def _spelled_alike(word: str, other: str) -> bool:
    if word.isdigit() or other.isdigit():
        return False
    return SequenceMatcher(None, word, other, autojunk=False).ratio() >= _ALIKE


def _abbreviates(names: frozenset[str], other: Reading) -> bool:
    """Whether the names are initials of consecutive words on the other side: "USA" for "United States of America"."""
    initials = "".join(word[0] for word in other.words)
    topical = "".join(word[0] for word in other.content)
    return all(2 <= len(name) <= 6 and (name in initials or name in topical) for name in names)


def _order_turned(question: Reading, candidate: Reading) -> bool:
    """The same words around a direction, in another order: "from A to B", "A before B"."""
    if question.content == candidate.content or sorted(question.content) != sorted(candidate.content):
        return False
    mine, theirs = _directed(question), _directed(candidate)
    return any(mine[word] != theirs[word] for word in mine.keys() & theirs.keys())


def _directed(reading: Reading) -> dict[str, str]:
    """For each word of direction the topical words behind it, two because "h1" is read as two."""
    found = {}
    for place, word in enumerate(reading.words):
        if word in DIRECTION_WORDS:
            behind = [stem(after) for after in reading.words[place + 1 :] if after not in FUNCTION_WORDS]
            found[word] = " ".join(behind[:2] if behind[1:] and behind[1][0].isdigit() else behind[:1])
    return found


_EXACT_KINDS = frozenset(("who", "whose", "when", "where", "how many", "how much", "how long", "how far", "how old", "how tall"))


def _exact_kind(question: Reading, candidate: Reading) -> bool:
    """Both ask for one kind of thing, and not the same: a person, a time, a place, an amount."""
    return question.asks in _EXACT_KINDS and candidate.asks in _EXACT_KINDS
