"""The token ids of texts that were asked for lately: who asks the same again, as whoever gets an answer from the cache does, has
nothing tokenised.

A text counts as known only to the tenant who sent it, for how long an answer takes would otherwise tell others of it. Bounded by
characters, of which each text has some more than its own, for what is kept beside it; the least recently used goes first. Safe to
use from any thread: long texts are tokenised beside the loop.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from common.tokenizer import Tokenizer

_Key = tuple[str, bool, Tokenizer, str]
_ENTRY_CHARS = 64  # a key, a tuple, and their places


class RecentTexts:
    """One per router."""

    def __init__(self, max_chars: int) -> None:
        self._max_chars = max_chars
        self._chars = 0
        self._ids: OrderedDict[_Key, tuple[int, ...]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_chars(self) -> int:
        return self._chars

    def encode(self, tokenizer: Tokenizer, text: str, *, add_special_tokens: bool, tenant: str) -> tuple[int, ...]:
        """What the tokenizer says of the text. `tenant` tells tenants apart. Raises what the tokenizer raises."""
        key = (tenant, add_special_tokens, tokenizer, text)
        with self._lock:
            ids = self._ids.get(key)
            if ids is not None:
                self._ids.move_to_end(key)
                return ids
        ids = tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))
        if _chars_of(text) <= self._max_chars:
            self._keep(key, ids)
        return ids

    def _keep(self, key: _Key, ids: tuple[int, ...]) -> None:
        with self._lock:
            if key not in self._ids:
                self._chars += _chars_of(key[-1])
            self._ids[key] = ids
            while self._chars > self._max_chars:
                oldest, _ = self._ids.popitem(last=False)
                self._chars -= _chars_of(oldest[-1])


def _chars_of(text: str) -> int:
    return len(text) + _ENTRY_CHARS
