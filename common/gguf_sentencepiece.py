"""SentencePiece BPE out of GGUF metadata: pieces with scores, no list of merges.

Text is cut into characters, and of all neighbours that together are a piece those with the highest score are joined, until none
are left; a character without a piece becomes its UTF-8 bytes. The library wants the merges instead: every way to make a piece of
two others, by the score of what they make. Pieces that stand for themselves, control tokens among them, are found before that.
"""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, normalizers

from common.errors import ModelLoadError
from common.gguf_reader import GGUFFile

_NORMAL = 1  # values of tokenizer.ggml.token_type; only these are made by joining
_SPACE = "▁"


def sentencepiece_backend(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> tokenizers.Tokenizer:
    """Without added tokens. Raises ModelLoadError."""
    scores = file.array("tokenizer.ggml.scores", float)
    if not len(tokens) == len(scores) == len(types):
        raise ModelLoadError(f"{file.path.name} lists {len(tokens)} tokens, {len(scores)} scores and {len(types)} types")
    unknown = file.get("tokenizer.ggml.unknown_token_id", int)
    if unknown is not None and unknown >= len(tokens):
        raise ModelLoadError(f"{file.path.name}: unknown token {unknown} is not in its vocabulary")
    try:
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab={token: token_id for token_id, token in enumerate(tokens)},
                merges=_merges(tokens, scores, types),
                unk_token=None if unknown is None else tokens[unknown],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
    except Exception as error:  # the library raises bare Exception for every malformed vocabulary
        raise ModelLoadError(f"{file.path.name} has a vocabulary that does not hold together: {error}") from error
    spaces = normalizers.Replace(" ", _SPACE)
    joined = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", bool) is False:
        backend.normalizer = spaces
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        joined.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(joined)
    return backend


def _merges(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    pieces = {token: token_id for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == _NORMAL}
    found: list[tuple[float, int, int, str, str]] = []
    for piece, token_id in pieces.items():
        score = -scores[token_id]
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((score, pieces[left], pieces[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]
