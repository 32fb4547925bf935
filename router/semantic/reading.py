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
    words: list[str] = []
    content: list[str] = []
    numbers = {f"version {version}" for version in versions}
    names: set[str] = set()
    negations = 0
    symbols: set[str] = set()
    starts = True  # a sentence, where a capital means nothing
    units: set[str] = set()
    follows_number = False
    shouting = sum(map(str.isupper, text)) > 0.6 * max(1, sum(map(str.isalpha, text)))
    tokens = _TOKEN.findall(text)
    capitalised = [token[0].isupper() for token in tokens if token[0].isalpha() and len(token) > 3]
    titled = len(capitalised) > 3 and all(capitalised)  # Every Word Like This: capitals tell nothing
    currency = ""  # a sign that waits for its number
    for token in tokens:
        if token in _SYMBOLS_THAT_COUNT:
            symbols.add(token)
            continue
        if token in UNITS and not token.isalpha():
            if follows_number:
                units.add(UNITS[token])
            else:
                currency = UNITS[token]
            continue
        if not token[0].isalpha():
            follows_number = token[-1].isalnum()
            if follows_number:
                number = _plain_number(token)
                numbers.add(number)
                words.append(number)
                content.append(number)
                if currency:
                    units.add(currency)
            else:
                starts = starts or token in _SENTENCE_ENDS
            currency = ""
            continue
        word = token.lower().replace("’", "'")
        if follows_number and word in UNITS:
            units.add(UNITS[word])
        follows_number = word in NUMBER_WORDS or (follows_number and word in ("more", "square", "cubic", "fluid"))
        negated = word.endswith("n't") or word in (
            "dont",
            "cant",
            "wont",
            "doesnt",
            "didnt",
            "isnt",
            "shouldnt",
            "wouldnt",
            "arent",
        )
        if negated or word in NEGATIONS:
            negations += 1
        if negated:
            root = word.removesuffix("n't") if word.endswith("n't") else word.removesuffix("nt")
            words += [{"ca": "can", "wo": "will", "do": "do"}.get(root, root), "not"]
        else:
            word = word.removesuffix("'s")
            words.append(word)
            if word in NUMBER_WORDS:
                numbers.add(NUMBER_WORDS[word])
            elif word in DATE_WORDS or (word == "may" and token == "May" and not starts):
                numbers.add(word[:3])
            if not shouting and not titled and token[0].isupper() and word not in ("i", "i'm", "i'd", "i've", "i'll"):
                capitals = token.isupper() and len(token) > 1
                inner = any(letter.isupper() for letter in token[1:])
                if (not starts or capitals or inner) and word not in FUNCTION_WORDS:
                    names.add(stem(word))
            if word not in FUNCTION_WORDS and word not in NEGATIONS:
                content.append(stem(word))
        starts = False
    return Reading(
        words=tuple(words),
        content=tuple(content),
        stems=frozenset(content),
        numbers=frozenset(numbers),
        units=frozenset(units),
        code=frozenset(code | quoted | symbols),
        names=frozenset(names),
        negations=negations,
        asks=_asks(words),
        latin_share=_latin_share(text),
    )


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
