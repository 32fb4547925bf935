"""What a question says, word by word: the facts that two questions are compared by. A pure function of the text.

A `Reading` holds no positions and no meaning, only sets that can be held against those of another question: numbers with their
units, dates, names, code, quotations, negations, and the words that carry the topic in a plain stemmed form.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from router.semantic.words import (
    DATE_WORDS,
    FUNCTION_WORDS,
    NEGATIONS,
    NUMBER_WORDS,
    QUANTITY_WORDS,
    QUESTION_WORDS,
    UNITS,
)

_QUOTED = re.compile(r"\"([^\"]{1,200})\"|“([^”]{1,200})”|«([^»]{1,200})»|`([^`]{1,200})`|(?<![\w'])'([^']{1,200})'(?!\w)")
_CODE = re.compile(
    r"https?://\S+"
    r"|[\w.+-]+@[\w-]+\.\w[\w.-]*"
    r"|(?:[A-Za-z]:)?(?:[\\/][\w.+-]+){2,}"  # paths
    r"|(?<![\w/~])~?/[\w.+-]+/?[\w.+/-]*"
    r"|(?<![\w-])--?[A-Za-z][\w-]*"  # flags
    r"|\b\w+(?:\.\w+)*\(\)"  # calls
    r"|\b[A-Za-z]\w*(?:_\w+)+\b|\b_\w+\b"
    r"|\b[a-z]+(?:[A-Z][a-z0-9]*)+\b"
    r"|\b\w+\.(?:py|js|ts|c|h|cpp|java|go|rs|rb|sh|txt|csv|json|ya?ml|toml|xml|html?|css|sql|pdf|docx?|xlsx?|png|jpe?g|exe|dll)\b"
    r"|\b[A-Za-z_]\w+(?:\.[A-Za-z_]\w+)+\b"
    r"|[A-Za-z]\+\+|\b[A-Za-z]#|#\w+|\.[A-Za-z]{2,5}\b|[<>=!]=|&&|\|\|"
)
_VERSION = re.compile(r"\bv?\d+(?:\.\d+){2,}\b|\bv\d+(?:\.\d+)*\b", re.IGNORECASE)
_TOKEN = re.compile(
    r"(?:(?<![\w.)])[-−])?(?:\d{1,3}(?:,\d{2,3})+(?!\d)|\d+)(?:\.\d+)?(?:(?:st|nd|rd|th)\b)?"
    r"|[^\W\d_]+(?:['’][^\W\d_]+)*|[%$€£₹¥+*^=<>?!.;:]"
)
_SENTENCE_ENDS = frozenset(".?!;:")
_SYMBOLS_THAT_COUNT = frozenset("+*^=<>")
_NEGATED_WITHOUT_APOSTROPHE = frozenset(["dont", "cant", "wont", "doesnt", "didnt", "isnt", "shouldnt", "wouldnt", "arent"])
_ROOTS = {"ca": "can", "wo": "will"}  # of "can't" and "won't"
_BETWEEN_NUMBER_AND_UNIT = frozenset(("more", "square", "cubic", "fluid"))
_FIRST_PERSON = frozenset(("i", "i'm", "i'd", "i've", "i'll"))


@dataclass(frozen=True, slots=True)
class Reading:
    words: tuple[str, ...]  # lower case, in order, contractions opened
    content: tuple[str, ...]  # stems of the words that carry the topic, in order
    stems: frozenset[str]
    numbers: frozenset[str]  # with dates and versions, each in one spelling
    units: frozenset[str]  # of those numbers
    code: frozenset[str]  # identifiers, paths, flags, quoted strings, operators: exactly as written
    names: frozenset[str]  # lower case; capitalised words inside sentences, and words in capitals
    negations: int
    asks: str  # the question word, "" if there is none
    latin_share: float  # of its letters


@lru_cache(maxsize=8192)
def stem(word: str) -> str:
    """A plain stem: plurals, -ing, -ed, -ly and -er fall together with their root well enough to compare, not to show."""
    if len(word) <= 3 or not word.isascii():
        return word
    for ending, put in (("ies", "y"), ("sses", "ss"), ("ches", "ch"), ("shes", "sh"), ("xes", "x")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word[: -len(ending)] + put
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    for ending in ("ing", "edly", "ed", "ly"):
        root = word[: -len(ending)]
        if word.endswith(ending) and len(root) >= 3 and any(letter in "aeiouy" for letter in root):
            word = root[:-1] if len(root) > 3 and root[-1] == root[-2] and root[-1] not in "lsz" else root
            break
    return word[:-1] if word.endswith("e") and len(word) > 3 else word


def read(text: str) -> Reading:
    quoted = {part for match in _QUOTED.finditer(text) for part in match.groups() if part}
    code = {match.group().rstrip(".,;:?!") for match in _CODE.finditer(text)}
    versions = {match.group().lower().removeprefix("v") for match in _VERSION.finditer(text)}
    tokens = _TOKEN.findall(text)
    pass_over = _Pass(capitals_count=not _shouts(text) and not _is_titled(tokens))
    for token in tokens:
        pass_over.token(token)
    return Reading(
        words=tuple(pass_over.words),
        content=tuple(pass_over.content),
        stems=frozenset(pass_over.content),
        numbers=frozenset(pass_over.numbers | {f"version {version}" for version in versions}),
        units=frozenset(pass_over.units),
        code=frozenset(code | quoted | pass_over.symbols),
        names=frozenset(pass_over.names),
        negations=pass_over.negations,
        asks=_asks(pass_over.words),
        latin_share=_latin_share(text),
    )


class _Pass:
    """One pass over the tokens of a text."""

    def __init__(self, *, capitals_count: bool) -> None:
        self.words: list[str] = []
        self.content: list[str] = []
        self.numbers: set[str] = set()
        self.units: set[str] = set()
        self.names: set[str] = set()
        self.symbols: set[str] = set()
        self.negations = 0
        self._capitals_count = capitals_count
        self._starts = True  # a sentence, where a capital means nothing
        self._follows_number = False
        self._currency = ""  # a sign that waits for its number

    def token(self, token: str) -> None:
        if token in _SYMBOLS_THAT_COUNT:
            self.symbols.add(token)
        elif token in UNITS and not token.isalpha():
            self._sign(UNITS[token])
        elif token[0].isalpha():
            self._word(token)
        elif token[-1].isalnum():
            self._number(_plain_number(token))
        else:
            self._follows_number, self._currency = False, ""
            self._starts = self._starts or token in _SENTENCE_ENDS

    def _sign(self, unit: str) -> None:
        """Of a unit: behind its number, or before it as that of a currency."""
        if self._follows_number:
            self.units.add(unit)
        else:
            self._currency = unit

    def _number(self, number: str) -> None:
        self.numbers.add(number)
        self.words.append(number)
        self.content.append(number)
        if self._currency:
            self.units.add(self._currency)
        self._follows_number, self._currency = True, ""

    def _word(self, token: str) -> None:
        word = token.lower().replace("’", "'")
        if self._follows_number and word in UNITS:
            self.units.add(UNITS[word])
        self._follows_number = word in NUMBER_WORDS or (self._follows_number and word in _BETWEEN_NUMBER_AND_UNIT)
        if word.endswith("n't") or word in _NEGATED_WITHOUT_APOSTROPHE:
            root = word.removesuffix("n't") if word.endswith("n't") else word.removesuffix("nt")
            self.words += [_ROOTS.get(root, root), "not"]
            self.negations += 1
        else:
            self.negations += word in NEGATIONS
            self._plain_word(token, word.removesuffix("'s"))
        self._starts = False

    def _plain_word(self, token: str, word: str) -> None:
        self.words.append(word)
        if word in NUMBER_WORDS:
            self.numbers.add(NUMBER_WORDS[word])
        elif word in DATE_WORDS or (word == "may" and token == "May" and not self._starts):
            self.numbers.add(word[:3])
        if self._capitals_count and token[0].isupper() and word not in _FIRST_PERSON:
            capitals = token.isupper() and len(token) > 1
            inner = any(letter.isupper() for letter in token[1:])
            if (not self._starts or capitals or inner) and word not in FUNCTION_WORDS:
                self.names.add(stem(word))
        if word not in FUNCTION_WORDS and word not in NEGATIONS:
            self.content.append(stem(word))


def _shouts(text: str) -> bool:
    return sum(map(str.isupper, text)) > 0.6 * max(1, sum(map(str.isalpha, text)))


def _is_titled(tokens: list[str]) -> bool:
    """Every Word Like This: capitals tell nothing."""
    capitalised = [token[0].isupper() for token in tokens if token[0].isalpha() and len(token) > 3]
    return len(capitalised) > 3 and all(capitalised)


def _plain_number(token: str) -> str:
    """One spelling: no separators, no zeros in front or behind; a sign and an ordinal's ending stay."""
    token = token.replace(",", "").replace("−", "-").lower()
    ordinal = token[-2:] if token[-1].isalpha() else ""
    digits = token.removesuffix(ordinal) if ordinal else token
    sign = "-" if digits.startswith("-") else ""
    whole, _, part = digits.lstrip("-+").partition(".")
    part = part.rstrip("0")
    return f"{sign}{whole.lstrip('0') or '0'}{'.' + part if part else ''}{ordinal}"


def _asks(words: list[str]) -> str:
    for place, word in enumerate(words):
        kind = QUESTION_WORDS.get(word)
        if kind is not None:
            following = words[place + 1] if place + 1 < len(words) else ""
            return f"how {following}" if kind == "how" and following in QUANTITY_WORDS else kind
    return ""


def _latin_share(text: str) -> float:
    letters = [letter for letter in text if letter.isalpha()]
    if not letters or text.isascii():
        return 1.0
    return sum(letter < "ɐ" for letter in letters) / len(letters)
