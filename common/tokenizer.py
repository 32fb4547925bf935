"""Text to token ids and back, for one model.

The router tokenises a prompt once and detokenises the stream; workers see ids only. A `Tokenizer` is loaded once per process from
what the model came with, a Hugging Face folder or a GGUF file, never changes, and may be used from any thread. A
`DetokenizerStream` belongs to one choice of one request: `push` every id in order, then `flush`; what they returned, joined, is
what `decode` says of all ids.

Special tokens that are spelled out in a text (`<|im_end|>`) become their ids by default, because chat templates are rendered as
text; this is so for prompts of clients as well. `encode(..., allow_special=False)` reads them as plain text.

Splitting and merging is the `tokenizers` library's. Does not know: weights, sampling, stop strings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders

from common.chat_template import ChatTemplate
from common.detokenizer import REPLACEMENT, ByteStream, DetokenizerStream, WindowStream, byte_level_bytes
from common.errors import InvalidRequest, ModelLoadError

_CONTEXT_TOKENS = 1024  # how far back a stream looks in the prompt for its context
_BYTE_FALLBACK = {f"<0x{value:02X}>": value for value in range(256)}


class _Looked(dict[int, bytes]):
    """The bytes of tokens, each looked up when it is first asked for; at most the vocabulary."""

    def __init__(self, look_up: Callable[[int], bytes]) -> None:
        super().__init__()
        self._look_up = look_up

    def __missing__(self, token_id: int) -> bytes:
        found = self[token_id] = self._look_up(token_id)
        return found


class Tokenizer:
    """Immutable and safe to share between threads. Make one with `load`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int],
        bos_token_id: int | None,
        context_tokens: int | None,
        digest: str,
        chat_template: ChatTemplate | None,
    ) -> None:
        self._backend = backend
        self.eos_token_ids = tuple(eos_token_ids)  # any of them ends a reply
        self.bos_token_id = bos_token_id
        self.context_tokens = context_tokens  # as the model states it; None if it does not
        self.digest = digest  # hex sha256 of what turns text into ids
        self.chat_template = chat_template
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self._added = backend.get_added_tokens_decoder()
        self._is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._special = frozenset(token_id for token_id, token in self._added.items() if token.special)
        self._bytes = _Looked(self._look_up_bytes)
        self._shown_bytes = _Looked(lambda token_id: b"" if token_id in self._special else self._bytes[token_id])

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """From a .gguf file or a Hugging Face folder. Blocking: up to a second or two. Raises ModelLoadError."""
        if not path.exists():
            raise ModelLoadError(f"no model at {path}; run `pdserve pull` or check the path")
        return _load_gguf(path) if path.is_file() else _load_folder(path)

    def encode(self, text: str, add_special_tokens: bool = True, *, allow_special: bool = True) -> list[int]:
        """`add_special_tokens` adds the model's own frame, such as a leading bos token; chat templates write theirs."""
        backend = self._backend if allow_special else self._literal_backend
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidRequest("the text holds half of a surrogate pair, which no encoding can express") from error
        return backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Ids that the vocabulary lacks (a model's embedding may be padded) are empty text."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token by itself, special or not; a part of a character reads as U+FFFD."""
        return self.decode((token_id,), skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """Exactly the bytes that the token stands for, even if they are only a part of a character."""
        return self._bytes[token_id]

    def _look_up_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            return byte_level_bytes(token)
        if token in _BYTE_FALLBACK:
            return bytes((_BYTE_FALLBACK[token],))
        return token.encode("utf-8") if token_id in self._added else token.replace("▁", " ").encode("utf-8")

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves the token out."""
        return token_id in self._special

    def stream(self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> DetokenizerStream:
        """A fresh stream for what follows `prompt_ids`."""
        if self._is_byte_level:
            return ByteStream((self._shown_bytes if skip_special_tokens else self._bytes).__getitem__)
        return WindowStream(self._backend, self._context_ids(prompt_ids), skip_special_tokens=skip_special_tokens)

    def _context_ids(self, prompt_ids: Sequence[int]) -> list[int]:
        """One id is enough to tell that the text goes on, so that a leading space belongs to it: the last that is text by itself.

        Parts of characters are no good: the library would read them together with the new tokens, and repeat them.
        """
        for token_id in reversed(prompt_ids[-_CONTEXT_TOKENS:]):
            text = self.decode((token_id,))
            if text and REPLACEMENT not in text:
                return [token_id]
        return []

    @cached_property
    def _literal_backend(self) -> tokenizers.Tokenizer:
        literal = tokenizers.Tokenizer.from_str(self._backend.to_str())
        literal.encode_special_tokens = True
        return literal


def _load_folder(folder: Path) -> Tokenizer:
    source = folder / "tokenizer.json"
    if not source.is_file():
        raise ModelLoadError(f"{folder} has no tokenizer.json; convert the model's tokenizer to that format first")
    content = _read(source)
    try:
        backend = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise ModelLoadError(f"{source} is not a tokenizer that can be read: {error}") from error
    # A file may carry the truncation or padding of its training; a prompt must never be changed.
    backend.no_truncation()
    backend.no_padding()
    config = _read_json(folder / "config.json")
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    special_tokens = {
        name: text
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (text := _special_text(tokenizer_config.get(name))) is not None
    }
    bos = backend.token_to_id(special_tokens["bos_token"]) if "bos_token" in special_tokens else config.get("bos_token_id")
    context = config.get("max_position_embeddings")
    return Tokenizer(
        backend,
        eos_token_ids=_eos_ids(folder, config, backend, special_tokens.get("eos_token")),
        bos_token_id=bos if isinstance(bos, int) else None,
        context_tokens=context if isinstance(context, int) else None,
        digest=hashlib.sha256(content.encode()).hexdigest(),
        chat_template=_chat_template(folder, tokenizer_config, special_tokens),
    )


def _eos_ids(folder: Path, config: Mapping[str, Any], backend: tokenizers.Tokenizer, eos_token: str | None) -> list[int]:
    """What generation stops at: generation_config.json rules over config.json, and the tokenizer's own end token counts too."""
    stated = _read_json(folder / "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    listed = stated if isinstance(stated, list) else [stated]
    ids = [token_id for token_id in listed if isinstance(token_id, int)]
    own = backend.token_to_id(eos_token) if eos_token is not None else None
    return ids if own is None or own in ids else [*ids, own]


def _special_text(value: Any) -> str | None:
    if isinstance(value, dict):  # older files store the token with its matching rules
        value = value.get("content")
    return value if isinstance(value, str) else None


def _chat_template(folder: Path, tokenizer_config: Mapping[str, Any], special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    file = folder / "chat_template.jinja"
    source = _read(file) if file.is_file() else tokenizer_config.get("chat_template")
    if isinstance(source, list):  # several by name
        by_name = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = by_name.get("default")
    return ChatTemplate(source, special_tokens=special_tokens) if isinstance(source, str) else None


def _load_gguf(path: Path) -> Tokenizer:
    # These import numpy, which the router does without until it loads such a file.
    from common.gguf_reader import GGUFFile
    from common.gguf_tokenizer import build_backend, end_token_ids, special_tokens, tokenizer_digest

    file = GGUFFile(path)
    template = file.get("tokenizer.chat_template", str)
    return Tokenizer(
        build_backend(file),
        eos_token_ids=end_token_ids(file),
        bos_token_id=file.get("tokenizer.ggml.bos_token_id", int),
        context_tokens=file.get(f"{file.require('general.architecture', str)}.context_length", int),
        digest=tokenizer_digest(file),
        chat_template=None if template is None else ChatTemplate(template, special_tokens=special_tokens(file)),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """An absent file is an empty one: every config file beside tokenizer.json is optional here."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path))
    except ValueError as error:
        raise ModelLoadError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object")
    return value
