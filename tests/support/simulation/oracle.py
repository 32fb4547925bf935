"""What the right answer is, computed from the prompt alone: no blocks, no pools, no workers.

The stand-in model: the KV of a token in a layer is eight bytes, a hash of the token and of its predecessor's KV in that layer;
half of them are its K, half its V. The next token is a hash of all the KV before it, in an order that no cut into blocks changes:
[layer][K, V][token]. So one wrong, stale or missing byte anywhere changes every token that follows.
"""

from __future__ import annotations

import struct

from xxhash import xxh3_64_digest, xxh3_64_intdigest

NUM_LAYERS = 2
TOKEN_BYTES = 8  # of KV, per layer
ROW_BYTES = TOKEN_BYTES // 2  # of K or V
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


class KV:
    """Of a text that grows."""

    def __init__(self, token_ids: tuple[int, ...] = ()) -> None:
        self.planes = [(bytearray(), bytearray()) for _ in range(NUM_LAYERS)]  # of each layer K and V, token by token
        self._last = [START] * NUM_LAYERS
        for token_id in token_ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        for layer, (keys, values) in enumerate(self.planes):
            kv = self._last[layer] = kv_of_next(self._last[layer], layer, token_id)
            keys += kv[:ROW_BYTES]
            values += kv[ROW_BYTES:]

    def all(self) -> bytes:
        return b"".join([plane for planes in self.planes for plane in planes])


def answer(prompt: tuple[int, ...], max_tokens: int, seed: int, choice: int) -> tuple[int, ...]:
    kv = KV(prompt)
    drawn: list[int] = []
    for _ in range(max_tokens):
        drawn.append(draw(kv.all(), seed, choice, len(prompt) + len(drawn)))
        kv.add(drawn[-1])
    return tuple(drawn)
