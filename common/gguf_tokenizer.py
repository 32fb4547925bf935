"""Tokenizers out of GGUF metadata, of two kinds.

    gpt2     byte-level BPE, as Llama 3, Qwen 2 and SmolLM2 use it
    llama    SentencePiece BPE with byte fallback, as Gemma and Llama 2 use it (`common.gguf_sentencepiece`)

For the former a GGUF file lists tokens, merges and token types, but only names the rule by which text is split before merging;
the rules known here are in one table, and a name that is not in it is refused, because a wrong split gives wrong ids without any
error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from common.errors import ModelLoadError
from common.gguf_reader import GGUFFile
from common.gguf_sentencepiece import sentencepiece_backend

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_KEY = "tokenizer.ggml"
# Files often name one end token only, while models also end with these when they stand in the vocabulary as control tokens.
_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>")

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class _Splitting:
    pre_tokenizer: Callable[[], pre_tokenizers.PreTokenizer]
    ignore_merges: bool = False  # a word that is a token as a whole is taken as that token
    normalizer: Callable[[], normalizers.Normalizer] | None = None


def _by_words(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


_SPLITTINGS = {
    "default": _Splitting(_gpt2),
    "gpt-2": _Splitting(_gpt2),
    "smollm": _Splitting(_smollm),
    "llama-bpe": _Splitting(lambda: _by_words(_LLAMA3_WORDS), ignore_merges=True),
    "qwen2": _Splitting(lambda: _by_words(_QWEN2_WORDS), normalizer=normalizers.NFC),
}


def build_backend(file: GGUFFile) -> tokenizers.Tokenizer:
    """Raises ModelLoadError if the file's tokenizer is of an unknown kind or does not hold together."""
    kind = file.require(f"{_KEY}.model", str)
    if kind not in ("gpt2", "llama"):
        raise ModelLoadError(
            f"{file.path.name} has a tokenizer of kind {kind!r}; supported are gpt2 (byte-level) and llama (SentencePiece BPE)"
        )
    tokens, types = file.array(f"{_KEY}.tokens", str), file.array(f"{_KEY}.token_type", int)
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if not tokens or len(vocabulary) != len(tokens):
        raise ModelLoadError(f"{file.path.name} has an empty vocabulary, or one that lists a token twice")
    backend = sentencepiece_backend(file, tokens, types) if kind == "llama" else _byte_level_backend(file, vocabulary)

    # Together: each call of the library builds its matcher anew.
    def of(wanted: int, *, special: bool) -> list[AddedToken]:
        found = (token for token, token_type in zip(tokens, types, strict=False) if token_type == wanted)
        return [AddedToken(token, normalized=False, special=special) for token in found]

    backend.add_special_tokens(of(_CONTROL, special=True))
    backend.add_tokens(of(_USER_DEFINED, special=False))
    _frame(file, backend)
    return backend


def _byte_level_backend(file: GGUFFile, vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    name = file.get(f"{_KEY}.pre", str) or "default"
    splitting = _SPLITTINGS.get(name)
    if splitting is None:
        raise ModelLoadError(f"{file.path.name} splits text by rule {name!r}; supported are {', '.join(sorted(_SPLITTINGS))}")
    merges = [merge.partition(" ")[::2] for merge in file.array(f"{_KEY}.merges", str)]
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=splitting.ignore_merges))
    except Exception as error:  # the library raises bare Exception for every malformed vocabulary
        raise ModelLoadError(f"{file.path.name} has a vocabulary that does not hold together: {error}") from error
    if splitting.normalizer is not None:
        backend.normalizer = splitting.normalizer()
    backend.pre_tokenizer = splitting.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend


def special_tokens(file: GGUFFile) -> dict[str, str]:
    """The names by which chat templates know them."""
    tokens = file.array(f"{_KEY}.tokens", str)
    found: dict[str, str] = {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        token_id = file.get(f"{_KEY}.{key}_token_id", int)
        if token_id is not None:
            if token_id >= len(tokens):
                raise ModelLoadError(f"{file.path.name}: {key} token {token_id} is not in its vocabulary")
            found[name] = tokens[token_id]
    return found


def end_token_ids(file: GGUFFile) -> list[int]:
    stated = [file.get(f"{_KEY}.{key}_token_id", int) for key in ("eos", "eot", "eom")]
    tokens, types = file.array(f"{_KEY}.tokens", str), file.array(f"{_KEY}.token_type", int)
    known = [
        token_id
        for token_id, (token, token_type) in enumerate(zip(tokens, types, strict=False))
        if token_type == _CONTROL and token in _END_TOKENS
    ]
    return list(dict.fromkeys(token_id for token_id in (*stated, *known) if token_id is not None))


def tokenizer_digest(file: GGUFFile) -> str:
    digest = hashlib.sha256()
    for key in sorted(key for key in file.keys if key.startswith(f"{_KEY}.")):
        digest.update(json.dumps([key, file.contents(key)]).encode())
    return digest.hexdigest()


def _frame(file: GGUFFile, backend: tokenizers.Tokenizer) -> None:
    """What `encode(add_special_tokens=True)` puts around a text."""
    special = special_tokens(file)
    before = [special["bos_token"]] if "bos_token" in special and file.get(f"{_KEY}.add_bos_token", bool) else []
    after = [special["eos_token"]] if "eos_token" in special and file.get(f"{_KEY}.add_eos_token", bool) else []
    if before or after:
        ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys((*before, *after))]
        backend.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=ids)
