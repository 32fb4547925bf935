"""What a client may say about the cache, in headers (HTTP) or metadata (gRPC) of the same names.

    Cache-Control: no-cache         do not answer from the cache; the new answer takes the old one's place
                   no-store         the new answer is not kept
                   only-if-cached   answer from the cache, or not at all
                   max-age=N        an answer from the cache is at most N seconds old
    x-cache: bypass                 as if there were no cache
    x-cache-tags: a, b              what the answer depends on, to be invalidated by; requests share answers only under equal tags

Other directives of `Cache-Control` mean nothing here and are passed over, as HTTP wants it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from common.errors import InvalidRequest

CONTROL_HEADERS = ("cache-control", "x-cache", "x-cache-tags")
MAX_TAGS = 16
TAG = re.compile(r"[A-Za-z0-9._:/@+-]{1,64}")
_MAX_AGE_DIGITS = 9


@dataclass(frozen=True, slots=True)
class CacheControl:
    look_up: bool = True
    store: bool = True
    only_if_cached: bool = False
    max_age_s: int | None = None
    bypass: bool = False
    tags: tuple[str, ...] = ()  # sorted


def cache_control(read: Callable[[str], str]) -> CacheControl:
    """`read` gives a header's value, several lines of it joined by commas, or "". Raises InvalidRequest naming the header."""
    directives = [item.strip().lower() for item in read("cache-control").split(",") if item.strip()]
    asked = read("x-cache").strip().lower()
    if asked not in ("", "bypass"):
        raise InvalidRequest("x-cache may only be 'bypass' in a request", param="x-cache")
    return CacheControl(
        look_up="no-cache" not in directives,
        store="no-store" not in directives,
        only_if_cached="only-if-cached" in directives,
        max_age_s=_max_age_s(directives),
        bypass=asked == "bypass",
        tags=checked_tags((item.strip() for item in read("x-cache-tags").split(",") if item.strip()), param="x-cache-tags"),
    )


def checked_tags(tags: Iterable[str], *, param: str) -> tuple[str, ...]:
    """Sorted, each once. Raises InvalidRequest."""
    found = sorted(set(tags))
    if len(found) > MAX_TAGS:
        raise InvalidRequest(f"at most {MAX_TAGS} tags", param=param)
    for tag in found:
        if not TAG.fullmatch(tag):
            raise InvalidRequest(f"a tag has 1 to 64 letters, digits or . _ : / @ + -, unlike {tag[:64]!r}", param=param)
    return tuple(found)


def _max_age_s(directives: list[str]) -> int | None:
    given = [item.removeprefix("max-age=").strip() for item in directives if item.startswith("max-age=")]
    if not given:
        return None
    for value in given:
        if not re.fullmatch(f"[0-9]{{1,{_MAX_AGE_DIGITS}}}", value, re.ASCII):
            raise InvalidRequest("max-age must be a number of seconds", param="Cache-Control")
    return min(map(int, given))
