"""Which questions are never asked of the semantic cache, found out before anything is spent on them.

What is left out is either too risky to answer from a similar question (it depends on the hour, on what was said before, on a
person's data) or outside what the vetoes can read.
"""

from __future__ import annotations

import enum
import re

from router.cache.semantic_port import Question
from router.semantic.reading import Reading
from router.semantic.words import CONTINUATIONS, PRONOUNS, TIME_SENSITIVE

_MAX_CHARS = 8_000  # about 2,000 tokens
_MIN_WORDS = 3
_MAX_FOLLOW_UP_WORDS = 4  # a later turn as short as this leans on the turns before it
_LEAST_LATIN = 0.9
_ELLIPSIS = re.compile(r"^\s*(?:\.\.\.|…)|(?:\.\.\.|…)\s*$")
_SECRETS = re.compile(
    r"\b[\w.+-]+@[\w-]+\.[a-z]{2,}\b"  # mail
    r"|\b(?:sk|pk|rk|ghp|gho|xox[abp])[-_][A-Za-z0-9_-]{12,}"
    r"|\bAKIA[A-Z0-9]{12,}\b|-----BEGIN [A-Z ]*KEY-----|\beyJ[\w-]{10,}\.[\w-]{10,}"
    r"|\b(?=[A-Za-z0-9+/_-]*\d)(?=[A-Za-z0-9+/_-]*[A-Za-z])[A-Za-z0-9+/_-]{32,}={0,2}"  # keys, tokens, digests
    r"|\b(?:\d[ -]?){13,19}\b"  # cards
    r"|\b\d{3}-\d{2}-\d{4}\b"
    r"|\+\d[\d ()-]{7,}\d\b|\(\d{3}\) ?\d{3}-\d{4}\b|\b\d{3}-\d{3}-\d{4}\b"  # telephones
    r"|\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,}\b"  # bank accounts
    r"|\b(?:\d{1,3}\.){3}\d{1,3}\b"
    r"|\b(?:my|our) (?:name|address|phone|password|passport|ssn|account|diagnosis|salary|date of birth|birthday)\b"
    r"|\b(?:password|passwd|secret|token|api[ _-]?key)\s*(?:is|[:=])",
    re.IGNORECASE,
)


class Ineligible(enum.StrEnum):
    TOOLS = "tools"
    LENGTH = "length"
    FOLLOW_UP = "follow-up"
    TIME = "time"
    SECRET = "secret"
    SCRIPT = "script"


def ineligible_at_once(question: Question) -> Ineligible | None:
    """What can be told without reading the text word by word."""
    if question.has_tools:
        return Ineligible.TOOLS
    if len(question.text) > _MAX_CHARS:
        return Ineligible.LENGTH
    return Ineligible.SECRET if _SECRETS.search(question.text) else None


def ineligible(question: Question, reading: Reading) -> Ineligible | None:
    if len(reading.words) < _MIN_WORDS and question.num_earlier_messages == 0:
        return Ineligible.LENGTH
    if reading.latin_share < _LEAST_LATIN or not reading.words:
        return Ineligible.SCRIPT
    if not TIME_SENSITIVE.isdisjoint(reading.words):
        return Ineligible.TIME
    if question.num_earlier_messages > 0 and _leans_on_earlier(question.text, reading):
        return Ineligible.FOLLOW_UP
    return None


def _leans_on_earlier(text: str, reading: Reading) -> bool:
    opening = reading.words[0]
    return (
        bool(_ELLIPSIS.search(text))
        or len(reading.words) <= _MAX_FOLLOW_UP_WORDS
        or opening in CONTINUATIONS
        or not PRONOUNS.isdisjoint(reading.words)
    )
