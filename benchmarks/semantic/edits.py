"""Questions that were turned into others by one small edit: negated, another number, name, word or question word, the opposite,
turned around."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from router.semantic.words import FUNCTION_WORDS, OPPOSITES

_AUXILIARY = re.compile(r"\b(is|are|was|were|do|does|did|can|could|should|would|will)\b", re.IGNORECASE)
_VERB = re.compile(r"^(How (?:do|can|should) (?:I|we|you|one)) (\w+)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])\d+(?![\w.])")
_NAME = re.compile(r"(?<=[a-z,] )([A-Z][a-z]{2,})(?![a-z])")
_QUESTION_WORD = re.compile(r"^(How|Why|When|Where|Who)\b(?! (?:many|much|long|far|old|often))")
_TOPICAL = re.compile(r"(?<= )[a-z]{4,}(?= )")
_FROM_TO = re.compile(r"\bfrom (\w+) to (\w+)\b")

_PAIRS = (
    "ancient modern, guilty innocent, strength weakness, strengths weaknesses, domestic foreign, temporary permanent, real fake, "
    "local global, teacher student, teachers students, employer employee, demand supply, theory practice, urban rural, wet dry, "
    "heaven hell, friend enemy, friends enemies, profit loss, debit credit, natural artificial, online offline, single married, "
    "buyer seller, landlord tenant, hardware software, civil criminal, major minor, junior senior, analog digital, liquid solid, "
    "conservative liberal, capitalism communism, democrats republicans, introvert extrovert, king queen, parents children, "
    "acid base, theist atheist, winter spring, science arts, doctor patient, doctors patients, cause cure, causes cures"
)
_UNLISTED: dict[str, str] = {}
for _pair in _PAIRS.split(", "):
    _one, _other = _pair.split()
    _UNLISTED |= {_one: _other, _other: _one}
_UNLISTED = {one: other for one, other in _UNLISTED.items() if other not in OPPOSITES.get(one, ())}

_SUBJECTS = [
    "garden",
    "kitchen",
    "battery",
    "contract",
    "mortgage",
    "violin",
    "protein",
    "passport",
    "elephant",
    "glacier",
    "insurance",
    "keyboard",
    "painting",
    "bicycle",
    "surgery",
    "tax",
    "wedding",
    "tomato",
    "engine",
    "poetry",
    "medicine",
    "uniform",
    "pregnancy",
    "visa",
    "fever",
    "database",
    "cooking",
    "camera",
    "desert",
    "chess",
]

Edit = Callable[[str, random.Random, list[str]], str | None]


def _negated(text: str, dice: random.Random, names: list[str]) -> str | None:
    verb = _VERB.match(text)
    if verb:
        return f"{verb.group(1)} not {text[verb.start(2) :]}"
    found = list(_AUXILIARY.finditer(text))
    if not found or re.search(r"n't|\b(?:not|no|never|without)\b", text):
        return None
    place = found[0]
    following = re.compile(r" (?:I|you|we|they|he|she|it|there|people|one|\w+s)\b").match(text, place.end())
    end = following.end() if following else place.end()
    return f"{text[:end]} not{text[end:]}"


def _other_number(text: str, dice: random.Random, names: list[str]) -> str | None:
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    place = dice.choice(found)
    return text[: place.start()] + str(int(place.group()) + dice.choice((1, 2, 5, 10))) + text[place.end() :]


def _other_name(text: str, dice: random.Random, names: list[str]) -> str | None:
    found = list(_NAME.finditer(text))
    if not found:
        return None
    place = dice.choice(found)
    other = dice.choice(names)
    return None if other.lower() in text.lower() else text[: place.start()] + other + text[place.end() :]


def _name_of_two_words(text: str, dice: random.Random, names: list[str]) -> str | None:
    found = list(_NAME.finditer(text))
    if not found:
        return None
    place = dice.choice(found)
    return f"{text[: place.start()]}{' '.join(dice.sample(names, 2))}{text[place.end() :]}"


def _names_swapped(text: str, dice: random.Random, names: list[str]) -> str | None:
    """Who does it, and whom it is done to; not where "and" or "or" makes them equals."""
    found = list(_NAME.finditer(text))
    if len(found) != 2 or found[0].group() == found[1].group():
        return None
    first, second = found
    between = text[first.end() : second.start()]
    if not re.search(r"[a-z]{3,}", between) or re.search(r"\b(?:and|or|vs|with|versus|between)\b|,", between):
        return None
    return f"{text[: first.start()]}{second.group()}{between}{first.group()}{text[second.end() :]}"


def _other_word(text: str, dice: random.Random, names: list[str]) -> str | None:
    """Some topical word in place of another, both in small letters."""
    found = [place for place in _TOPICAL.finditer(text) if place.group() not in FUNCTION_WORDS]
    if not found:
        return None
    place, other = dice.choice(found), dice.choice(_SUBJECTS)
    return None if other in text else text[: place.start()] + other + text[place.end() :]


def _other_question_word(text: str, dice: random.Random, names: list[str]) -> str | None:
    found = _QUESTION_WORD.match(text)
    if found is None:
        return None
    return dice.choice([word for word in ("How", "Why", "When", "Where", "Who") if word != found.group(1)]) + text[found.end() :]


def _opposite(text: str, dice: random.Random, names: list[str]) -> str | None:
    words = [word for word in re.findall(r"[A-Za-z]+", text) if word in OPPOSITES]
    if not words:
        return None
    word = dice.choice(words)
    other = dice.choice(sorted(OPPOSITES[word]))
    return None if re.search(rf"\b{other}\b", text) else re.sub(rf"\b{word}\b", other, text, count=1)


def _unlisted_opposite(text: str, dice: random.Random, names: list[str]) -> str | None:
    """Of words that no veto knows for opposites."""
    words = [word for word in re.findall(r"[A-Za-z]+", text) if word in _UNLISTED]
    if not words:
        return None
    word = dice.choice(words)
    return re.sub(rf"\b{word}\b", _UNLISTED[word], text, count=1)


def _turned(text: str, dice: random.Random, names: list[str]) -> str | None:
    found = _FROM_TO.search(text)
    if found is None or any(word.lower() in FUNCTION_WORDS for word in found.groups()):
        return None
    return f"{text[: found.start()]}from {found.group(2)} to {found.group(1)}{text[found.end() :]}"


EDITS: dict[str, Edit] = {
    "negation": _negated,
    "number": _other_number,
    "name": _other_name,
    "name, small letters": _other_name,
    "name of two words": _name_of_two_words,
    "name of two words, small letters": _name_of_two_words,
    "names swapped": _names_swapped,
    "word": _other_word,
    "question word": _other_question_word,
    "opposite": _opposite,
    "opposite, unlisted": _unlisted_opposite,
    "direction": _turned,
}


def edited_pairs(texts: list[str], count: int, seed: int) -> list[tuple[str, str, str]]:
    """(kind, question, the edited question), the kinds in turn while they have questions to edit."""
    dice = random.Random(seed)
    names = sorted({name for text in texts for name in _NAME.findall(text)})
    found: list[tuple[str, str, str]] = []
    orders = {kind: iter(dice.sample(texts, len(texts))) for kind in EDITS}
    while len(found) < count and orders:
        for kind in list(orders):
            for text in orders[kind]:
                edited = EDITS[kind](text, dice, names)
                if edited is not None and edited != text:
                    pair = (text.lower(), edited.lower()) if kind.endswith("small letters") else (text, edited)
                    found.append((kind, *pair))
                    break
            else:
                del orders[kind]
    return found[:count]
