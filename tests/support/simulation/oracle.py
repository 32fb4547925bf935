"""What the right answer is, computed from the prompt alone: no blocks, no pools, no workers.

The stand-in model: the KV of a token in a layer is eight bytes, a hash of the token and of its predecessor's KV in that layer;
the next token is a hash of all the KV before it. So one wrong, stale or missing byte anywhere changes every token that follows.
"""

from __future__ import annotations

import struct

from xxhash import xxh3_64_digest, xxh3_64_intdigest

NUM_LAYERS = 2
BLOCK_TOKENS = 4
TOKEN_BYTES = 8  # of KV, per layer
VOCABULARY = 50_000
_token = struct.Struct("<8sQI").pack
_draw = struct.Struct("<8sQII").pack
START = b"\0" * TOKEN_BYTES


def kv_of_next(before: bytes, layer: int, token_id: int) -> bytes:
    digest: bytes = xxh3_64_digest(_token(before, layer, token_id))
    return digest


def draw(all_kv: bytes, seed: int, choice: int, position: int) -> int:
    number: int = xxh3_64_intdigest(_draw(xxh3_64_digest(all_kv), seed, choice, position))
    return number % VOCABULARY


def blocks_of(token_ids: tuple[int, ...]) -> list[bytes]:
    """The KV of a prompt, block by block, the last one only as far as it is filled."""
    layers = []
    for layer in range(NUM_LAYERS):
        kv, last = [], START
        for token_id in token_ids:
            last = kv_of_next(last, layer, token_id)
            kv.append(last)
        layers.append(kv)
    return [
        b"".join(b"".join(kv[start : start + BLOCK_TOKENS]) for kv in layers) for start in range(0, len(token_ids), BLOCK_TOKENS)
    ]


def answer(prompt: tuple[int, ...], max_tokens: int, seed: int, choice: int) -> tuple[int, ...]:
    token_ids = list(prompt)
    for _ in range(max_tokens):
        all_kv = b"".join(blocks_of(tuple(token_ids)))
        token_ids.append(draw(all_kv, seed, choice, len(token_ids)))
    return tuple(token_ids[len(prompt) :])
