"""Text out of a growing sequence of tokens, given as early as it is final.

A character may be spread over several tokens, so text must be held back until it is whole. Two ways, chosen by the tokenizer:

    ByteStream     byte-level vocabularies (Llama 3, Qwen, SmolLM2): a token is a string of bytes whatever surrounds it, so an
                   incremental UTF-8 decoder is exact, holds back 3 bytes at most, and costs the same per token for ever.
    WindowStream   vocabularies whose tokens read differently at the start of a text (SentencePiece): by decoding a window.

Does not know: stop strings, which tokens are special, requests.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

import tokenizers

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_HELD_TOKENS = 16  # a character has 4 bytes at most: what is held longer is broken, and bounded here


class DetokenizerStream(Protocol):
    """One choice of one request. `push` every id in order, `flush` once at the end; the pieces joined are the text."""

    def push(self, token_id: int) -> str:
        """The text that this token made final; may be empty."""
        ...

    def push_all(self, token_ids: Sequence[int]) -> str:
        """What pushing them one by one gives, joined."""
        ...

    def flush(self) -> str:
        """What is left: an unfinished character, as U+FFFD."""
        ...


class ByteStream:
    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._bytes_of(token_id))

    def push_all(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(map(self._bytes_of, token_ids)))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """Decodes a short window again and again: the last ids whose text is out, for context, and the ids held since.

        |== out ==|== context ==|-- held --|        new text = decode(context + held) without its beginning decode(context)

    The library's own `DecodeStream` does the same, but gives up, with an untyped error, on a model that writes broken bytes.
    """

    def __init__(self, backend: tokenizers.Tokenizer, prompt_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        """`prompt_ids` are looked back on for context and must not end inside a character."""
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._context = list(prompt_ids)
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        self._held.append(token_id)
        text = self._new_text()
        if not text or (text.endswith(REPLACEMENT) and len(self._held) < _MAX_HELD_TOKENS):
            return ""
        self._context, self._held = self._held, []
        return text

    def push_all(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self.push, token_ids))

    def flush(self) -> str:
        return self._new_text()

    def _new_text(self) -> str:
        before = self._decode(self._context)
        text = self._decode([*self._context, *self._held])
        # Bytes that were whole characters can turn out to be part of a broken run; what is out cannot be taken back.
        return text[len(before) :] if text.startswith(before) else self._decode(self._held)

    def _decode(self, token_ids: list[int]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


def byte_level_bytes(token: str) -> bytes:
    """The bytes behind a token of a byte-level vocabulary, which spells each byte as one printable character."""
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:  # an added token, spelled as it is
        return token.encode("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """Printable Latin-1 stands for itself; the other bytes, in order, take the characters from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + index): value for index, value in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
